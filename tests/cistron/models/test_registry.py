from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import ESM2, EVO2, tiny_esm2, tiny_evo2

from cistron.errors import (
    CapabilityError,
    CheckpointNotFoundError,
    ConfigError,
    UnknownNameError,
)
from cistron.models.checkpoint import save_checkpoint
from cistron.models.evo2.config import Evo2Config
from cistron.models.registry import build_model, config_from, get_spec, list_models, load_model

PUBLISHED = [name for name in list_models() if get_spec(name).published_parameters is not None]


def test_every_published_model_is_listed():
    names = list_models()
    assert len(set(names)) == len(names) == 8 + 6 + 6 + 2
    assert {"evo2_7b", "evo2_40b_base", "striped_hyena_7b_nv", "esm2_t33_650M_UR50D", "evo2_tiny"} <= set(names)
    assert len(PUBLISHED) == 14


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shape_has_the_published_number_of_parameters(name: str):
    spec = get_spec(name)
    model = build_model(name, device="meta")
    assert model.family == spec.family
    contact_head = sum(p.numel() for n, p in model.named_parameters() if "contact_head" in n)
    assert model.num_parameters() - contact_head == spec.published_parameters


@pytest.mark.parametrize("name", sorted(set(list_models()) - set(PUBLISHED)))
def test_the_other_shapes_can_be_built(name: str):
    assert build_model(name, device="meta").num_parameters() > 0


@pytest.mark.parametrize(
    ("name", "attention", "medium"),
    [
        ("evo2_1b_base", [3, 10, 17, 24], [1, 5, 8, 12, 15, 19, 22]),
        ("evo2_7b", [3, 10, 17, 24, 31], [1, 5, 8, 12, 15, 19, 22, 26, 29]),
        ("evo2_20b", [3, 10, 17], [1, 5, 8, 12, 15, 19, 22]),
        ("evo2_40b", [3, 10, 17, 24, 31, 35, 42, 49], [1, 5, 8, 12, 15, 19, 22, 26, 29, 33, 37, 40, 44, 47]),
    ],
)
def test_operators_are_at_the_published_places(name: str, attention: list[int], medium: list[int]):
    config = get_spec(name).config
    assert isinstance(config, Evo2Config)
    assert [i for i, symbol in enumerate(config.layer_pattern) if symbol == "*"] == attention
    assert [i for i, symbol in enumerate(config.layer_pattern) if symbol == "D"] == medium


def test_context_and_precision_needs_of_the_released_models():
    configs = {name: get_spec(name).config for name in list_models() if name.startswith("evo2_")}
    assert {name for name, c in configs.items() if isinstance(c, Evo2Config) and c.requires_fp8} == {
        "evo2_1b_base",
        "evo2_20b",
        "evo2_40b_base",
        "evo2_40b",
    }
    rotary = {
        name: (c.max_length, c.rotary_base, c.rotary_scaling) for name, c in configs.items() if name != "evo2_tiny"
    }
    assert rotary == {
        "evo2_1b_base": (8192, 1e4, 1),
        "evo2_7b_base": (8192, 1e4, 1),
        "evo2_7b_262k": (262_144, 1e4, 32),
        "evo2_7b": (1_048_576, 1e4, 128),
        "evo2_7b_microviridae": (8192, 1e4, 1),
        "evo2_20b": (1_048_576, 1e6, 128),
        "evo2_40b_base": (8192, 1e6, 1),
        "evo2_40b": (1_048_576, 1e6, 128),
    }


def test_short_names_of_esm2():
    assert get_spec("esm2_650m") is get_spec("esm2_t33_650M_UR50D")


def test_an_unknown_name_suggests_the_nearest():
    for call in (get_spec, config_from, build_model, load_model):
        with pytest.raises(UnknownNameError, match=r"evo2_7B.*did you mean 'evo2_7b'"):
            call("evo2_7B")


def test_a_mapping_describes_a_model():
    assert config_from(EVO2).model_dump().items() >= EVO2.items()
    assert build_model(ESM2, device="meta").family == "esm2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "evo"}, "unknown model family 'evo'; did you mean 'evo2'"),
        ({"model_type": None}, "unknown model family None"),
        ({"hidden_sise": 8}, "hidden_sise: no such setting; did you mean 'hidden_size'"),
        ({"layer_pattern": "SXH"}, "layer_pattern"),
    ],
)
def test_a_bad_mapping_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config_from({**EVO2, **change})


def test_a_model_is_loaded_from_a_folder_a_url_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = {**get_spec("evo2_tiny").config.model_dump()}
    model = tiny_evo2(**config)
    directory = save_checkpoint(model, tmp_path / "evo2_tiny")
    monkeypatch.setenv("CISTRON_MODELS", str(tmp_path))
    for source in (directory, str(directory), directory.as_uri(), "evo2_tiny"):
        loaded = load_model(source)
        assert not loaded.training
        assert torch.equal(loaded.state_dict()["embedding.weight"], model.state_dict()["embedding.weight"])


def test_a_model_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CISTRON_MODELS", raising=False)
    with pytest.raises(CheckpointNotFoundError, match=r"evo2_7b are not on this machine.*huggingface\.co/arcinstitute"):
        load_model("evo2_7b")
    monkeypatch.setenv("CISTRON_MODELS", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="evo2_7b does not exist"):
        load_model("evo2_7b")
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), (tmp_path / "nowhere").as_uri()):
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint at"):
            load_model(source)


def test_auto_keeps_the_stored_dtype_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = save_checkpoint(tiny_esm2().bfloat16(), tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="cistron"):
        assert next(load_model(directory).parameters()).dtype == torch.bfloat16
    assert "weights in bfloat16 (as stored)" in caplog.text
    assert next(load_model(directory, precision="fp32").parameters()).dtype == torch.float32
    assert next(load_model(directory, dtype=torch.float32).parameters()).dtype == torch.float32


def test_a_model_that_needs_fp8_runs_only_when_the_precision_is_named(tmp_path: Path):
    directory = save_checkpoint(tiny_evo2(requires_fp8=True), tmp_path / "model")
    for options in ({}, {"dtype": torch.bfloat16}):
        with pytest.raises(CapabilityError, match=r"known to degrade without them.*precision='bf16'"):
            load_model(directory, **options)
    assert load_model(directory, precision="fp32")


def test_contradicting_precisions(tmp_path: Path):
    directory = save_checkpoint(tiny_esm2(), tmp_path / "model")
    with pytest.raises(ConfigError, match="contradict each other"):
        load_model(directory, dtype=torch.float32, precision="bf16")
    with pytest.raises(ConfigError, match="precision must be one of auto, bf16, fp32, got 'int3'"):
        load_model(directory, precision="int3")  # type: ignore[arg-type]
