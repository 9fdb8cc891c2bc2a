from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cistron.models.evo2_formats import (
    CACHE,
    NATIVE,
    SAVANNA,
    TAPS,
    Bomb,
    assert_same,
    frequencies,
    native,
    random_layers,
    savanna,
    vortex,
)

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cistron.models.convert import convert_checkpoint
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.convert import read_savanna, write_savanna
from cistron.models.evo2.model import Evo2

CUT_ROWS = (
    "word_embeddings.weight",
    "dense_projection.weight",
    "short_conv_weight",
    "conv_bias",
    "filter.decay",
    "filter.gamma",
    "filter.h",
    "filter.p",
    "filter.R",
    "w1.weight",
    "w2.weight",
)
CUT_COLUMNS = ("mixer.dense.weight", "w3.weight")


def read(path, config=SAVANNA, **options):
    parsed, tensors = read_savanna(path, **{"config": config, "trust_pickle": False, **options})
    return parsed, dict(tensors)


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("form", ["flat", "module", "wrapped", "safetensors", "parts", "folder"])
def test_every_container_holds_the_same_weights(form, tmp_path):
    layers = random_layers()
    theirs = savanna(layers)
    path, config = tmp_path / "x.pt", SAVANNA
    if form == "flat":
        torch.save(theirs, path)
    elif form == "wrapped":
        torch.save({"module": {f"module.{name}": tensor for name, tensor in theirs.items()}, "step": 3}, path)
    elif form == "safetensors":
        path, config = tmp_path / "x.safetensors", None
        save_file(theirs, path, metadata={"config": json.dumps(SAVANNA)})
    else:
        torch.save({"module": theirs}, path)
    if form == "parts":
        data = path.read_bytes()
        path.unlink()
        for number in range(3):
            (tmp_path / f"x.pt.part{number}").write_bytes(data[number * 40_000 : (number + 1) * 40_000 or None])
        (tmp_path / "x.pt.part2").write_bytes(data[80_000:])
    parsed, tensors = read(tmp_path if form == "folder" else path, config)
    assert_same(tensors, native(layers))
    expected = {**NATIVE, "parametrization": "training", "norm_eps_inside": True, "filter_cache_length": CACHE}
    assert parsed == Evo2Config(**expected)


def test_our_own_field_names_do_as_well(tmp_path):
    path = saved(tmp_path / "x.pt", savanna(random_layers()))
    assert read(path, NATIVE)[0] == read(path)[0]
    assert read(path, {**NATIVE, "norm_eps_inside": False})[0].norm_eps_inside is False


def test_the_final_norm_may_follow_the_last_layer_directly(tmp_path):
    layers = random_layers()
    _, tensors = read(saved(tmp_path / "x.pt", savanna(layers, norm_place=2)))
    assert_same(tensors, native(layers))


def test_an_untied_model_has_an_output_layer_of_its_own(tmp_path):
    layers = random_layers()
    path = saved(tmp_path / "x.pt", savanna(layers, tied=False))
    parsed, tensors = read(path, {**SAVANNA, "no_weight_tying": True})
    assert_same(tensors, native(layers, tied=False))
    with pytest.raises(CheckpointError, match=r"unexpected tensor sequential\.9\.final_linear"):
        read(path)
    assert not parsed.tie_embeddings


def test_known_extras_are_dropped_with_a_note_and_others_are_not(tmp_path, caplog):
    layers = random_layers()
    theirs = savanna(layers)
    theirs["sequential.4.mixer.mixer.filter.t"] = torch.arange(9)[None, None]
    theirs["sequential.2.post_attention_layernorm.weight"] = torch.ones(32)
    theirs["sequential.2.mlp.w1._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    with caplog.at_level(logging.INFO, logger="cistron"):
        assert_same(read(saved(tmp_path / "x.pt", theirs))[1], native(layers))
    assert "dropping 3 entries" in caplog.text
    theirs["sequential.3.mixer.mystery.weight"] = torch.ones(2)
    with pytest.raises(CheckpointError, match=r"unexpected tensor sequential\.3\.mixer\.mystery\.weight"):
        read(saved(tmp_path / "x.pt", theirs))


def test_the_base_is_that_of_the_stored_frequencies_not_of_later_settings(tmp_path):
    layers = random_layers()
    layers[3]["inv_freq"] = frequencies(1e6)
    path = saved(tmp_path / "x.pt", savanna(layers))
    scaled = {"pos_emb": "rotary_linear_scaled", "rotary_emb_base": 1e11, "rotary_emb_scaling_factor": 128}
    parsed, tensors = read(path, {**SAVANNA, **scaled})
    assert (parsed.rotary_base, parsed.rotary_scaling) == (1e6, 128)
    assert torch.equal(tensors["blocks.3.mixer.rotary.inv_freq"], frequencies(1e6))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden-size": 64, "num_groups_hyena": 64}, CheckpointError, r"has shape \[512, 32\].*says \[512, 64\]"),
        ({"hyena_mr_len": 64}, CheckpointError, "has 40 taps, the model uses 64"),
        ({"num_layers": 6}, ConfigError, "operator_config has 5 layers, num_layers is 6"),
        ({"operator-config": [[["mamba"], 5]]}, ConfigError, "no operator 'mamba'"),
        ({"norm": "layernorm"}, ConfigError, "norm: Evo 2 has 'rmsnorm'"),
        ({"num_groups_hyena_short": 4}, ConfigError, "num_groups_hyena_short"),
        ({"seq_length": None}, ConfigError, "has no seq_length"),
    ],
)
def test_a_file_of_another_model_is_refused(change, error, words, tmp_path):
    path = saved(tmp_path / "x.pt", savanna(random_layers()))
    with pytest.raises(error, match=words):
        convert_checkpoint(path, tmp_path / "model", source_format="savanna", config={**SAVANNA, **change})
    assert [found.name for found in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_written_is_what_was_read(suffix, tmp_path):
    layers = random_layers()
    path = saved(tmp_path / "x.pt", savanna(layers))
    directory = convert_checkpoint(path, tmp_path / "model", source_format="savanna", config=SAVANNA)
    out = tmp_path / f"out{suffix}"
    convert_checkpoint(directory, out, source_format="cistron", target_format="savanna")
    written = torch.load(out, weights_only=True)["module"] if suffix == ".pt" else load_file(out)
    for name, tensor in written.items():
        if name.endswith(("filter.h", "filter.decay")):
            assert tensor.shape[1] == CACHE
            assert not tensor[:, TAPS:].any()
    for layer in layers:
        for key in ("h", "decay"):
            if key in layer and layer[key].shape[-1] == CACHE:
                layer[key] = torch.where(torch.arange(CACHE) < TAPS, layer[key], 0)
    assert_same(written, savanna(layers))
    again, tensors = read(out, None if suffix == ".safetensors" else SAVANNA)
    assert_same(tensors, native(layers))
    assert again == read(path)[0]


def test_a_file_becomes_vortex_by_the_published_formulas(tmp_path):
    layers = random_layers()
    path = saved(tmp_path / "x.pt", savanna(layers))
    out = convert_checkpoint(
        path, tmp_path / "out.safetensors", source_format="savanna", target_format="vortex", config=SAVANNA
    )
    assert_same(load_file(out), vortex(layers))


@pytest.mark.parametrize("change", [{"hcs_bias": True}, {"mlp_activation": "gelu"}, {"attention_output_bias": False}])
def test_a_feature_without_a_place_is_refused(change, tmp_path):
    config = Evo2Config(**{**NATIVE, **change})
    with pytest.raises(CheckpointError, match="savanna format has no place"):
        write_savanna(config, Evo2(config).state_dict().items(), tmp_path / "x.pt")


def rank_share(tensors, rank, count):
    def cut(name, tensor):
        if name.endswith(CUT_COLUMNS):
            return tensor.chunk(count, dim=1)[rank]
        return tensor.chunk(count, dim=0)[rank] if name.endswith(CUT_ROWS) else tensor

    return {name: cut(name, tensor).clone() for name, tensor in tensors.items()}


def write_ranks(folder, tensors, count, **extra):
    for rank in range(count):
        content = {"module": rank_share(tensors, rank, count), "param_shapes": [{"x": torch.Size([3])}], **extra}
        torch.save(content, folder / f"mp_rank_{rank:02d}_model_states.pt")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_shares_of_all_ranks_are_joined(count, tmp_path):
    layers = random_layers()
    random_state = {"np_rng_state": np.random.RandomState(0).get_state(), "dp_world_size": 3, "mp_world_size": count}
    write_ranks(tmp_path, savanna(layers), count, **random_state)
    (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not read")
    _, tensors = read(tmp_path)
    assert_same(tensors, native(layers))


def test_a_missing_rank_is_named(tmp_path, caplog):
    write_ranks(tmp_path, savanna(random_layers()), 4, mp_world_size=4)
    (tmp_path / "mp_rank_03_model_states.pt").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"mp_rank_03_model_states\.pt does not exist.*had 4 ranks"):
        convert_checkpoint(tmp_path, tmp_path / "model", source_format="savanna", config=SAVANNA)
    assert not (tmp_path / "model").exists()
    write_ranks(tmp_path, savanna(random_layers()), 4)
    (tmp_path / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"mp_rank_01_model_states\.pt"):
        read(tmp_path)
    # Nothing says how many there were: the shapes do.
    write_ranks(tmp_path, savanna(random_layers()), 4)
    (tmp_path / "mp_rank_03_model_states.pt").unlink()
    with (
        caplog.at_level(logging.INFO, logger="cistron"),
        pytest.raises(CheckpointError, match=r"has shape \[\d+, 32\], the configuration says"),
    ):
        read(tmp_path, {**NATIVE})
    assert "taking its 3 ranks for all that there were" in caplog.text


def test_ranks_that_do_not_fit_are_named(tmp_path):
    write_ranks(tmp_path, savanna(random_layers()), 2)
    share = rank_share(savanna(random_layers()), 1, 2)
    share["sequential.2.input_layernorm.weight"] += 1
    saved(tmp_path / "mp_rank_01_model_states.pt", {"module": share})
    with pytest.raises(CheckpointError, match=r"mp_rank_01.*sequential\.2\.input_layernorm\.weight differs"):
        read(tmp_path)
    del share["sequential.2.input_layernorm.weight"]
    saved(tmp_path / "mp_rank_01_model_states.pt", {"module": share})
    with pytest.raises(CheckpointError, match=r"mp_rank_01.*disagree about tensor sequential\.2\.input_layernorm"):
        read(tmp_path)
    share["sequential.2.input_layernorm.weight"] = torch.ones(3)
    saved(tmp_path / "mp_rank_01_model_states.pt", {"module": share})
    with pytest.raises(CheckpointError, match=r"mp_rank_01.*has shape \[3\], and \[32\] in mp_rank_00"):
        read(tmp_path)


def test_no_rank_runs_code(tmp_path):
    write_ranks(tmp_path, savanna(random_layers()), 2, rng_tracker_states=Bomb(tmp_path / "boom"))
    with pytest.raises(CheckpointError, match="trust_pickle=true"):
        read(tmp_path)
    assert not (tmp_path / "boom").exists()
    assert read(tmp_path, trust_pickle=True)
    assert (tmp_path / "boom").exists()


def test_a_released_name_says_the_configuration(tmp_path):
    # The published shape is known by the name; these tensors are not of that shape.
    with pytest.raises(CheckpointError, match=r"savanna_evo2_1b_base\.pt: .*has 40 taps, the model uses 128"):
        read(saved(tmp_path / "savanna_evo2_1b_base.pt", savanna(random_layers())), None)
