"""FP8 states of foreign checkpoints: what is read of them, and what they cannot make us do."""

from __future__ import annotations

import io
import logging
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cistron.models.evo2_formats import NATIVE, PROVIDER, SAVANNA, Bomb, mbridge, random_layers, savanna, vortex
from tests.cistron.models.test_evo2_mbridge import save
from tests.cistron.models.test_evo2_savanna import write_ranks

from cistron.errors import CheckpointError
from cistron.models.convert import convert_checkpoint
from cistron.models.evo2.convert import read_mbridge, read_savanna, read_vortex, write_mbridge, write_vortex
from cistron.models.evo2.fp8_state import make_state, parse_state
from cistron.models.evo2.model import Evo2

HYENA = (0, 1, 2, 4)


@pytest.fixture
def recipe(monkeypatch):
    """Return an object of a class that only the writer of a state has."""
    modules = {}
    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe"):
        modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    kind = type("DelayedScaling", (), {"__module__": "transformer_engine.common.recipe"})
    modules["transformer_engine.common.recipe"].DelayedScaling = kind
    made = kind()
    made.margin, made.amax_history_len = 0, 16
    return made


def state(input_scale, weight_scale, **more):
    return {
        "scale_fwd": torch.tensor([input_scale, weight_scale, 1.0]),
        "amax_history_fwd": torch.rand(16, 3),
        "scale_bwd": torch.ones(2),
        "amax_history_bwd": torch.rand(16, 2),
        "extra_fp8_variables": {"num_gemms": 1},
        **more,
    }


def pickled(content):
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def streamed(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream


@pytest.mark.parametrize("wrap", [pickled, streamed, lambda content: streamed(pickled(content))])
def test_scales_are_read_without_the_library_that_wrote_them(wrap, recipe, monkeypatch):
    wrapped = wrap(state(3.5, 0.25, recipe=recipe))
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    data = wrapped.getvalue() if isinstance(wrapped, io.BytesIO) else wrapped.numpy().tobytes()
    assert parse_state(data) == (3.5, 0.25)


def test_a_state_may_be_empty():
    assert parse_state(b"") is None
    assert parse_state(streamed(torch.empty(0, dtype=torch.uint8)).getvalue()) is None
    assert parse_state(pickle.dumps({"recipe": None})) is None
    assert parse_state(pickle.dumps(None)) is None


def test_what_is_written_can_be_read():
    data = make_state(torch.tensor(7.0), torch.tensor(0.5))
    assert parse_state(data.numpy().tobytes()) == (7.0, 0.5)


@pytest.mark.parametrize("wrap", [pickle.dumps, lambda content: streamed(content).getvalue()])
def test_a_state_runs_no_code(wrap, tmp_path):
    with pytest.raises(CheckpointError, match=r"it asks for \w+\.exec"):
        parse_state(wrap({**state(1, 1), "recipe": Bomb(tmp_path / "boom")}))
    nested = pickle.dumps(Bomb(tmp_path / "boom"))
    with pytest.raises(CheckpointError):
        parse_state(b"\x80\x04ctorch.storage\n_load_from_bytes\n" + pickle.dumps((nested,))[2:-1] + b"R.")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (state(float("nan"), 1.0), "positive numbers"),
        (state(1.0, 0.0), "positive numbers"),
        (state(float("inf"), 1.0), "positive numbers"),
        ({"scale_fwd": torch.ones(1)}, "input and a weight scale"),
        ({"scale_fwd": [1.0, 1.0]}, "input and a weight scale"),
    ],
)
def test_scales_that_are_none_are_refused(content, words):
    with pytest.raises(CheckpointError, match=words):
        parse_state(pickle.dumps(content))


def with_states(theirs, name, layers=HYENA):
    """Add a state to each Hyena layer: input scale 10 + i, weight scale 1 / (1 + i)."""
    for index in layers:
        theirs[name.format(index, index + 2)] = pickled(state(10.0 + index, 1 / (1 + index)))
    return theirs


def scales_of(tensors):
    return {
        index: tuple(
            tensors[f"blocks.{index}.mixer.projection.fp8.{kind}_scale"].item() for kind in ("input", "weight")
        )
        for index in HYENA
    }


EXPECTED = {index: (10.0 + index, torch.tensor(1 / (1 + index)).item()) for index in HYENA}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_vortex_scales_become_native_tensors_and_come_back(suffix, tmp_path):
    theirs = with_states(vortex(random_layers()), "blocks.{}.projections._extra_state")
    path = tmp_path / f"x{suffix}"
    torch.save(theirs, path) if suffix == ".pt" else save_file(theirs, path)
    config, tensors = read_vortex(path, config=NATIVE, trust_pickle=False)
    tensors = dict(tensors)
    assert config.fp8_scales
    assert scales_of(tensors) == EXPECTED
    Evo2(config).load_state_dict(tensors)
    out = tmp_path / f"out{suffix}"
    write_vortex(config, tensors.items(), out)
    written = torch.load(out, weights_only=True) if suffix == ".pt" else load_file(out)
    assert written.keys() == theirs.keys()
    again, native = read_vortex(out, config=NATIVE, trust_pickle=False)
    assert again == config
    assert scales_of(dict(native)) == EXPECTED


def test_layers_without_a_state_are_unscaled(tmp_path, caplog):
    theirs = with_states(vortex(random_layers()), "blocks.{}.projections._extra_state", layers=(0, 2))
    theirs["blocks.1.projections._extra_state"] = torch.empty(0, dtype=torch.uint8)
    save_file(theirs, tmp_path / "x.safetensors")
    with caplog.at_level(logging.INFO, logger="cistron"):
        _, tensors = read_vortex(tmp_path / "x.safetensors", config=NATIVE, trust_pickle=False)
    assert "layers [1, 4] have no FP8 state" in caplog.text
    scales = scales_of(dict(tensors))
    assert (scales[0], scales[1], scales[4]) == (EXPECTED[0], (1.0, 1.0), (1.0, 1.0))


def test_states_that_cannot_be_read_are_dropped_together_or_refused(tmp_path, caplog):
    theirs = vortex(random_layers())
    theirs["blocks.0.projections._extra_state"] = torch.full((9,), 7, dtype=torch.uint8)
    save_file(theirs, tmp_path / "x.safetensors")
    with caplog.at_level(logging.WARNING, logger="cistron"):
        config, _ = read_vortex(tmp_path / "x.safetensors", config=NATIVE, trust_pickle=False)
    assert not config.fp8_scales
    assert "dropping the FP8 states, which cannot be read (layer 0" in caplog.text
    save_file(with_states(theirs, "blocks.{}.projections._extra_state", layers=(2,)), tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="the FP8 state of layer 0 cannot be read, others can"):
        convert_checkpoint(tmp_path / "y.safetensors", tmp_path / "model", source_format="vortex", config=NATIVE)
    assert not (tmp_path / "model").exists()


def test_the_scale_of_a_matrix_is_the_smallest_of_its_shares(tmp_path):
    theirs = with_states(savanna(random_layers()), "sequential.{1}.mixer.dense_projection._extra_state")
    write_ranks(tmp_path, theirs, 2)
    first = torch.load(tmp_path / "mp_rank_00_model_states.pt", weights_only=True)
    first["module"]["sequential.2.mixer.dense_projection._extra_state"] = streamed(state(9.0, 40.0))
    torch.save(first, tmp_path / "mp_rank_00_model_states.pt")
    config, tensors = read_savanna(tmp_path, config=SAVANNA, trust_pickle=False)
    assert config.fp8_scales
    assert scales_of(dict(tensors)) == {**EXPECTED, 0: (9.0, 1.0)}


def test_scales_are_read_from_a_distributed_checkpoint_and_not_written_there(tmp_path, caplog):
    theirs = mbridge(random_layers())
    for index in HYENA:
        name = f"decoder.layers.{index}.mixer.dense_projection._extra_state/shard_0_1"
        theirs[name] = streamed(pickled(state(*EXPECTED[index])))
    save(tmp_path / "iter_0000001", theirs)
    config, tensors = read_mbridge(tmp_path, config=PROVIDER, trust_pickle=False)
    tensors = dict(tensors)
    assert scales_of(tensors) == EXPECTED
    (tmp_path / "out").mkdir()
    write_mbridge(config, tensors.items(), tmp_path / "out")
    assert "dropping the FP8 scales" in caplog.text
    assert not read_mbridge(tmp_path / "out", config=None, trust_pickle=False)[0].fp8_scales
