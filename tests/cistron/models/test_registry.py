from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import ESM2, EVO2, tiny_esm2, tiny_evo2

from cistron.errors import (
    CapabilityError,
    CheckpointError,
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
    assert len(set(names)) == len(names) == 8 + 6 + 2 + 7 + 2
    assert {"evo2_7b", "evo2_40b_base", "striped_hyena_7b_nv", "esm2_t33_650M_UR50D", "evo2_tiny"} <= set(names)
    assert len(PUBLISHED) == 14


# Of each family: width, heads, inner size of the MLP, filter groups, rotary base, and what differs from Arc's defaults.
EVO2_1B = (1920, 15, 5120, 128, 1e4)
EVO2_7B = (4096, 32, 11_008, 256, 1e4)
EVO2_40B = (8192, 64, 21_888, 512, 1e6)
LAYERS_1B = "SDH*SDHSDH*SDHSDH*SDHSDH*"
LAYERS_7B = "SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*"
LAYERS_20B = "SDH*SDHSDH*SDHSDH*SDHSDH"
LAYERS_40B = "SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*SDH*SDHSDH*SDHSDH*"
LONG = {"rotary_scaling": 128.0, "max_length": 1_048_576}
NVIDIA = {"mlp_activation": "gelu", "attention_output_bias": False, "hcs_bias": True, "norm_eps_inside": True}
UNTIED = {"tie_embeddings": False, "embedding_init_std": 1.0}
SHAPES: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "evo2_1b_base": (LAYERS_1B, EVO2_1B, {"requires_fp8": True}),
    "evo2_7b_base": (LAYERS_7B, EVO2_7B, {}),
    "evo2_7b_262k": (LAYERS_7B, EVO2_7B, {"rotary_scaling": 32.0, "max_length": 262_144}),
    "evo2_7b": (LAYERS_7B, (4096, 32, 11_264, 256, 1e4), LONG),
    "evo2_7b_microviridae": (LAYERS_7B, EVO2_7B, {}),
    "evo2_20b": (LAYERS_20B, (8192, 64, 22_528, 512, 1e6), {**LONG, "requires_fp8": True}),
    "evo2_40b_base": (LAYERS_40B, EVO2_40B, {"requires_fp8": True}),
    "evo2_40b": (LAYERS_40B, (8192, 64, 22_528, 512, 1e6), {**LONG, "requires_fp8": True}),
    "striped_hyena_1b_nv": (LAYERS_1B, EVO2_1B, NVIDIA),
    "striped_hyena_7b_nv": (LAYERS_7B, (4096, 32, 11_264, 256, 1e6), NVIDIA),
    "striped_hyena_40b_nv": (LAYERS_40B, (8192, 64, 22_528, 512, 1e6), NVIDIA),
    "striped_hyena_1b_nv_parallel": (LAYERS_1B, (2048, 16, 5120, 128, 1e4), {**NVIDIA, **UNTIED}),
    "striped_hyena_test": ("SDH*", EVO2_7B, {"norm_eps_inside": True}),
    "striped_hyena_test_nv": ("SDH*", EVO2_7B, NVIDIA),
    "shc-evo2-50m": ("SDH*SDHSDH*", (640, 10, 1792, 64, 1e4), {}),
    "shc-evo2-100m": ("SDH*SDHSDH*SDH*", (768, 12, 2048, 64, 1e4), {}),
}
SHARED = {
    "model_type": "evo2",
    "vocab_size": 512,
    "short_filter_length": 3,
    "hcs_filter_length": 7,
    "hcm_filter_length": 128,
    "state_size": 16,
    "rotary_scaling": 1.0,
    "max_length": 8192,
    "norm_eps": 1e-6,
    "norm_eps_inside": False,
    "mlp_activation": "first_layer_gelu",
    "hcs_bias": False,
    "attention_output_bias": True,
    "tie_embeddings": True,
    "embedding_init_std": None,
    "requires_fp8": False,
    "fp8_scales": False,
    "parametrization": "inference",
    "filter_cache_length": 8192,
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_setting_of_an_evo2_is_the_published_one(name: str):
    pattern, (width, heads, mlp, groups, base), differences = SHAPES[name]
    expected = {
        **SHARED,
        "layer_pattern": pattern,
        "hidden_size": width,
        "num_attention_heads": heads,
        "mlp_size": mlp,
        "num_filter_groups": groups,
        "rotary_base": base,
        **differences,
    }
    assert get_spec(name).config.model_dump() == expected
    assert {*SHAPES, "evo2_tiny"} == {other for other in list_models() if get_spec(other).family == "evo2"}


@pytest.mark.parametrize("name", SHAPES)
def test_the_number_of_parameters_is_that_of_the_layers(name: str):
    """Count by hand what each kind of layer holds."""
    pattern, (width, _, mlp, groups, _), differences = SHAPES[name]
    nvidia = differences.get("hcs_bias", False)
    attention = 4 * width * width + (0 if nvidia else width)
    hyena = 3 * width * width + 3 * width * 3 + width * width + width
    kinds = {
        "*": attention,
        "S": hyena + groups * 7 + (groups if nvidia else 0),
        "D": hyena + groups * 128 + width,
        "H": hyena + 2 * width * 16 + width,
    }
    layers = sum(kinds[symbol] + 3 * width * mlp + 2 * width for symbol in pattern)
    embeddings = 512 * width * (1 if differences.get("tie_embeddings", True) else 2)
    assert build_model(name, device="meta").num_parameters() == layers + embeddings + width


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shape_has_the_published_number_of_parameters(name: str):
    spec = get_spec(name)
    model = build_model(name, device="meta")
    assert model.family == spec.family
    contact_head = sum(p.numel() for n, p in model.named_parameters() if "contact_head" in n)
    assert model.num_parameters() - contact_head == spec.published_parameters


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


def test_short_names_of_esm2():
    assert get_spec("esm2_650m") is get_spec("esm2_t33_650M_UR50D")


def test_the_shape_that_nobody_published(monkeypatch: pytest.MonkeyPatch):
    """Its parameters, by hand: per layer 12 H^2 + 13 H, then embedding, final norm and head."""
    spec = get_spec("esm2_20b_unpublished")
    width = 5120
    assert (spec.published_parameters, spec.sources) == (None, ())
    expected = 64 * (12 * width**2 + 13 * width) + 33 * width + 2 * width + width**2 + 3 * width + 33
    assert build_model(spec.name, device="meta").num_parameters() == expected == 20_163_328_033
    monkeypatch.delenv("CISTRON_MODELS", raising=False)
    with pytest.raises(CheckpointNotFoundError, match="nobody is known to publish any"):
        load_model(spec.name)
    for name in ("esm2_20b", "esm2_t64_20B_UR50D"):
        for call in (get_spec, config_from, build_model, load_model):
            with pytest.raises(UnknownNameError, match=r"was ever published.*esm2_20b_unpublished is a shape"):
                call(name)


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


def test_short_names_are_folders_too_and_another_size_under_a_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CISTRON_MODELS", str(tmp_path))
    for name, model in (("esm2_8m", tiny_esm2()), ("evo2_7b", tiny_evo2())):
        save_checkpoint(model, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name} is not \w+: hidden_size is \d+, of \w+ (320|4096)"):
            load_model(name)


def test_a_device_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CapabilityError, match="device cuda:1: this machine has no CUDA device"):
        load_model(save_checkpoint(tiny_esm2(), tmp_path / "model"), device="cuda:1")


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
        with pytest.raises(CapabilityError, match=r"known to degrade without them.*'bf16'"):
            load_model(directory, **options)
    assert load_model(directory, precision="fp32")


def test_contradicting_precisions(tmp_path: Path):
    directory = save_checkpoint(tiny_esm2(), tmp_path / "model")
    with pytest.raises(ConfigError, match="contradict each other"):
        load_model(directory, dtype=torch.float32, precision="bf16")
    with pytest.raises(ConfigError, match=r"precision must be one of auto, .*bf16, fp32, int8, got 'int3'"):
        load_model(directory, precision="int3")  # type: ignore[arg-type]
