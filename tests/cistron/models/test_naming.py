from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import UnknownNameError
from cistron.models.naming import canonical_layer, layer_names

IDS = torch.randint(5, 20, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (0, "blocks.0"),
        (-1, "final_norm"),
        (-2, "blocks.31"),
        ("embedding_layer", "embedding"),
        ("blocks.26", "blocks.26"),
        ("decoder.layers.26", "blocks.26"),
        ("blocks.28.mlp.l3", "blocks.28.mlp"),
        ("decoder.layers.28.mlp.linear_fc2", "blocks.28.mlp"),
        ("decoder.layers.28.mlp", "blocks.28.mlp"),
        ("decoder.layers.3.mixer", "blocks.3.mixer"),
        ("norm", "final_norm"),
        ("decoder.final_norm", "final_norm"),
        ("unembed", "logits"),
        ("output_layer", "logits"),
    ],
)
def test_every_dialect_is_understood(layer, expected):
    assert canonical_layer(layer, num_layers=32) == expected


def test_canonical_names_mean_themselves():
    names = layer_names(3)
    assert len(names) == len(set(names)) == 3 * 3 + 3
    assert [canonical_layer(name, num_layers=3) for name in names] == names


@pytest.mark.parametrize(
    "layer", ["blocks.32", -34, 32, "blocks.3.mlp.l1", "blocks.3.mlp.linear_fc2", "decoder.layers.3.mlp.l3", "blocks"]
)
def test_what_does_not_exist_is_an_error_that_says_what_does(layer):
    with pytest.raises(UnknownNameError, match=r"known: embedding, blocks.0 .. blocks.31, each also with .mixer or"):
        canonical_layer(layer, num_layers=32)


@pytest.mark.parametrize("make", [tiny_evo2, tiny_esm2])
@torch.inference_mode()
def test_mixer_and_mlp_are_what_a_block_adds(make):
    model = make()
    names = layer_names(len(model.blocks))
    output = model(IDS, hidden_states=names)
    found, plain = output.hidden_states, model(IDS)
    assert set(found) == set(names)
    stream = found["embedding"]
    for index in range(len(model.blocks)):
        stream = stream + found[f"blocks.{index}.mixer"] + found[f"blocks.{index}.mlp"]
        assert (stream - found[f"blocks.{index}"]).abs().max() < 1e-5 * stream.abs().max()
    assert torch.equal(found["logits"], plain.logits)
    assert not plain.hidden_states
    assert not any(module._forward_hooks for module in model.modules())


@torch.inference_mode()
def test_packed_input_has_them_too():
    model = tiny_evo2()
    offsets = torch.tensor([0, 7, 12])
    name = "blocks.3.mixer"
    packed = model(IDS[0], cu_seqlens=offsets, hidden_states=[name]).hidden_states[name]
    alone = model(IDS[:1, 7:], hidden_states=[name]).hidden_states[name]
    assert (packed[7:] - alone[0]).abs().max() < 1e-5
