from __future__ import annotations

from pathlib import Path

import pytest

import cistron
from cistron.config import parse_overrides, resolve
from cistron.errors import ConfigError, UnknownNameError
from cistron_jobs.convert import ConvertConfig, run

SOURCE = Path(__file__).parents[1] / "golden" / "evo2_tiny.vortex.safetensors"


def config(tmp_path: Path, *words: str) -> ConvertConfig:
    given = [f"source={SOURCE}", "source_format=vortex", f"destination={tmp_path / 'model'}", *words]
    return resolve(ConvertConfig, parse_overrides(given))


def test_a_converted_checkpoint_loads(tmp_path: Path):
    assert run(config(tmp_path)) == tmp_path / "model"
    assert cistron.load_model(tmp_path / "model").family == "evo2"


def test_the_form_of_the_filters_can_be_chosen(tmp_path: Path):
    run(config(tmp_path, "parametrization=training"))
    assert cistron.load_model(tmp_path / "model").config.parametrization == "training"
    with pytest.raises(ConfigError, match="parametrization: Input should be 'inference' or 'training'"):
        config(tmp_path, "parametrization=trained")


def test_the_format_is_told_by_the_file(tmp_path: Path):
    given = [f"source={SOURCE}", f"destination={tmp_path / 'model'}"]
    run(resolve(ConvertConfig, parse_overrides(given)))
    assert cistron.load_model(tmp_path / "model").family == "evo2"


def test_an_unknown_format_leaves_nothing(tmp_path: Path):
    with pytest.raises(UnknownNameError, match="did you mean 'vortex'"):
        run(config(tmp_path, "source_format=votrex"))
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_setting(tmp_path: Path):
    with pytest.raises(ConfigError, match="trust_pickel: no such setting; did you mean 'trust_pickle'"):
        config(tmp_path, "trust_pickel=true")
