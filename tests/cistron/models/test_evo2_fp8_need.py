from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cistron.models.evo2_formats import NATIVE, SAVANNA, mbridge, random_layers, savanna, vortex
from tests.cistron.models.test_evo2_mbridge import write
from tests.tiny_models import tiny_evo2

from cistron.errors import ConfigError
from cistron.models.checkpoint import read_config, save_checkpoint
from cistron.models.convert import convert_checkpoint
from cistron.models.evo2 import fp8_need
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.convert import read_mbridge, read_savanna, read_vortex, write_mbridge
from cistron.models.evo2.fp8_need import with_known_need
from cistron.models.published import ModelSpec
from cistron.models.registry import get_spec


def config(name: str, **changes: Any) -> Evo2Config:
    found = get_spec(name).config
    assert isinstance(found, Evo2Config)
    return found.model_copy(update={"requires_fp8": False, "norm_eps_inside": True, **changes})


@pytest.mark.parametrize("name", ["evo2_1b_base", "evo2_20b", "evo2_40b_base", "evo2_40b"])
def test_a_shape_that_needs_fp8_needs_it_unless_something_says_otherwise(name: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="cistron"):
        found = with_known_need(config(name), {"vortex_style_fp8": False, "requires_fp8": None}, Path("x"))
    assert found == config(name, requires_fp8=True)
    assert f"x has the shape of {name} and is taken to need FP8" in caplog.text


@pytest.mark.parametrize("word", ["requires_fp8", "use_fp8_input_projections", "use-fp8-input-projections"])
def test_what_the_settings_say_counts(word: str, caplog: pytest.LogCaptureFixture):
    assert with_known_need(config("evo2_1b_base"), {word: False}, Path("x")) == config("evo2_1b_base")
    assert not caplog.records


def test_our_own_word_holds_in_every_format():
    needing = config("evo2_7b", requires_fp8=True)
    assert with_known_need(config("evo2_7b"), {"requires_fp8": True}, Path("x")) == needing
    assert with_known_need(needing, {"requires_fp8": False}, Path("x")) == config("evo2_7b")
    with pytest.raises(ConfigError, match="requires_fp8"):
        with_known_need(needing, {"requires_fp8": "often"}, Path("x"))


@pytest.mark.parametrize(
    "name", ["evo2_7b_base", "evo2_7b", "striped_hyena_1b_nv", "striped_hyena_40b_nv", "evo2_tiny"]
)
def test_other_shapes_need_none(name: str):
    assert with_known_need(config(name), {}, Path("x")) == config(name)


def test_every_reader_knows_the_need_and_what_was_decided_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sensitive = ModelSpec("sensitive", "evo2", Evo2Config.from_json({**NATIVE, "requires_fp8": True}), None)
    monkeypatch.setattr(fp8_need, "all_specs", lambda: [sensitive])
    layers = random_layers()
    torch.save(vortex(layers), tmp_path / "vortex.pt")
    torch.save(savanna(layers), tmp_path / "savanna.pt")
    assert read_vortex(tmp_path / "vortex.pt", config=NATIVE, trust_pickle=False)[0].requires_fp8
    assert read_savanna(tmp_path / "savanna.pt", config=SAVANNA, trust_pickle=False)[0].requires_fp8
    folder = write(tmp_path / "mbridge", mbridge(layers), vortex_style_fp8=False)
    assert read_mbridge(folder, config=None, trust_pickle=False)[0].requires_fp8
    tuned, tensors = read_mbridge(folder, config={"requires_fp8": False}, trust_pickle=False)
    assert not tuned.requires_fp8
    (tmp_path / "again").mkdir()
    write_mbridge(tuned, tensors, tmp_path / "again")
    assert not read_mbridge(tmp_path / "again", config=None, trust_pickle=False)[0].requires_fp8


@pytest.mark.parametrize("target", ["vortex", "savanna", "mbridge"])
@pytest.mark.parametrize("needed", [True, False])
def test_what_weights_need_survives_a_round_trip(target: str, needed: bool, tmp_path: Path):
    model = tiny_evo2(requires_fp8=needed, fp8_scales=target != "mbridge")
    native = save_checkpoint(model, tmp_path / "native")
    foreign = tmp_path / ("mbridge" if target == "mbridge" else f"{target}.safetensors")
    convert_checkpoint(native, foreign, source_format="cistron", target_format=target)
    convert_checkpoint(foreign, tmp_path / "again", source_format=target)
    assert read_config(tmp_path / "again").requires_fp8 is needed
