from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import CapabilityError, ConfigError
from cistron.models import precision
from cistron.models.checkpoint import save_checkpoint
from cistron.models.layers.fp8 import Fp8Projection
from cistron.models.layers.fp8_hardware import Hardware
from cistron.models.layers.int8 import Int8Linear
from cistron.models.precision import EVIDENCE, Plan, Precision, plan_precision
from cistron.models.registry import config_from, get_spec, list_models, load_model
from cistron_jobs.model_config import ModelJobConfig
from cistron_serve.deployments import ModelSettings

NOTHING = Hardware(None, None, "FP8 products need an NVIDIA GPU, and this is cpu")
HARDWARE = {
    "cpu": NOTHING,
    "hopper": Hardware("scaled_mm", "hopper", "an H100"),
    "hopper_te": Hardware("transformer_engine", "hopper", "an H100"),
    "blackwell": Hardware("transformer_engine", "blackwell", "a B200"),
    "ada": Hardware("scaled_mm", "ada", "an L40"),
    "unheard_of": Hardware("scaled_mm", None, "a later GPU"),
}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plan for a published model, as if on other hardware."""

    def plan(hardware: str, model: str, asked: Precision = "auto", **options: Any) -> Plan:
        monkeypatch.setattr(precision, "fp8_hardware", lambda device: HARDWARE[hardware])
        options = {"dtype": None, "device": torch.device("cpu"), "source": model, **options}
        return plan_precision(config_from(model), asked, **options)

    return plan


def test_the_evidence_covers_the_models_that_need_fp8():
    needing = {name for name in list_models() if getattr(get_spec(name).config, "requires_fp8", False)}
    assert needing == set(EVIDENCE)


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("model", ["evo2_7b", "evo2_7b_262k", "evo2_7b_microviridae", "evo2_tiny", "esm2_8m"])
def test_auto_keeps_the_weights_of_models_that_do_not_need_fp8(on: Any, hardware: str, model: str):
    assert on(hardware, model) == Plan(None, None, None, "as stored")
    assert on(hardware, model, dtype=torch.bfloat16) == Plan(None, torch.bfloat16, None, "as asked")


@pytest.mark.parametrize(
    ("model", "good"),
    [
        ("evo2_1b_base", {"hopper", "hopper_te", "blackwell"}),
        ("evo2_20b", {"hopper", "hopper_te"}),
        ("evo2_40b_base", {"hopper", "hopper_te"}),
        ("evo2_40b", {"hopper", "hopper_te"}),
    ],
)
def test_auto_takes_fp8_where_it_is_known_to_be_good(on: Any, model: str, good: set[str]):
    for hardware, can in HARDWARE.items():
        if hardware in good:
            plan = on(hardware, model)
            assert (plan.path, plan.fp8, plan.warning) == ("fp8", can.path, "")
            assert plan.reason == f"on {can.reason}, scales 1 because the checkpoint stores none"
        else:
            with pytest.raises(CapabilityError) as refused:
                on(hardware, model)
            message = str(refused.value)
            assert message.startswith(f"{model} was trained with FP8")
            assert can.reason in message
            assert all(f"'{path}'" in message for path in ("fp8_hopper_emulated", "fp8_emulated", "bf16", "fp32"))
            assert ("'fp8'" in message) == (can.path is not None)


def test_a_named_path_runs_with_what_is_known_against_it(on: Any):
    assert on("hopper", "evo2_40b", "fp8").warning == ""
    assert "known to degrade on this path (evaluation loss 0.92" in on("blackwell", "evo2_40b", "fp8").warning
    assert "known to degrade" in on("cpu", "evo2_40b", "fp8_emulated").warning
    assert "nobody has published" in on("ada", "evo2_40b", "fp8").warning
    assert "nobody has published" in on("unheard_of", "evo2_1b_base", "fp8").warning
    assert "nobody has published" in on("cpu", "evo2_20b", "fp8_emulated").warning
    for path in ("bf16", "fp32"):
        assert "1.24 in bf16" in on("hopper", "evo2_1b_base", path).warning
        assert on("cpu", "evo2_7b", path).warning == ""
    for model in ("evo2_40b", "evo2_1b_base", "evo2_7b"):
        plan = on("cpu", model, "fp8_hopper_emulated")
        assert plan.warning == ""
        assert "not compared with hardware" in plan.reason


def test_fp8_needs_hardware_and_a_model_with_projections(on: Any):
    for model in ("evo2_7b", "evo2_40b"):
        with pytest.raises(CapabilityError, match=r"precision=fp8 is not possible here: .*this is cpu; fp8_emulated"):
            on("cpu", model, "fp8")
    for path in ("fp8", "fp8_emulated", "fp8_hopper_emulated"):
        with pytest.raises(ConfigError, match=f"precision={path} is for the input projections of Evo 2"):
            on("hopper", "esm2_8m", path)


def test_an_unknown_shape_that_needs_fp8_is_trusted_on_hopper_only(monkeypatch: pytest.MonkeyPatch):
    config = config_from({**get_spec("evo2_tiny").config.model_dump(), "requires_fp8": True, "fp8_scales": True})
    for hardware in ("hopper", "blackwell"):
        monkeypatch.setattr(precision, "fp8_hardware", lambda device, name=hardware: HARDWARE[name])
        options = {"dtype": torch.bfloat16, "device": torch.device("cuda"), "source": "mine"}
        if hardware == "hopper":
            assert plan_precision(config, "auto", **options) == Plan(
                "fp8", torch.bfloat16, "scaled_mm", "on an H100, stored scales"
            )
        else:
            with pytest.raises(CapabilityError, match="not known to be good enough"):
                plan_precision(config, "auto", **options)


@pytest.mark.parametrize(
    ("asked", "stored", "path", "projections"),
    [
        ("auto", torch.bfloat16, "bf16", None),
        ("auto", torch.float32, "fp32", None),
        ("bf16", torch.float32, "bf16", None),
        ("fp8_emulated", torch.bfloat16, "fp8_emulated", "emulated"),
        ("fp8_hopper_emulated", torch.float32, "fp8_hopper_emulated", "hopper_emulated"),
    ],
)
def test_a_loaded_model_says_which_path_it_took(
    asked: Precision,
    stored: torch.dtype,
    path: str,
    projections: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    directory = save_checkpoint(tiny_evo2().to(stored), tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="cistron"):
        model = load_model(directory, precision=asked)
    assert model.precision_path == path
    assert f"precision path {path}, weights in" in caplog.text
    assert model.precision_reason in caplog.text
    assert {module.path for module in model.modules() if isinstance(module, Fp8Projection)} == {projections}
    expected = stored if asked != "bf16" else torch.bfloat16
    assert next(model.parameters()).dtype == expected


def test_the_warning_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = save_checkpoint(tiny_evo2(requires_fp8=True), tmp_path / "model")
    with pytest.raises(CapabilityError, match="there is no FP8 here"):
        load_model(directory)
    assert load_model(directory, precision="fp32").precision_path == "fp32"
    assert "precision path fp32: these weights are known to degrade on this path" in caplog.text


def test_models_built_or_of_another_family(tmp_path: Path):
    assert tiny_evo2().precision_path == "as built"
    assert load_model(save_checkpoint(tiny_esm2(), tmp_path / "model")).precision_path == "fp32"


@pytest.mark.parametrize("path", get_args(Precision))
def test_jobs_and_serving_take_every_path(path: Precision):
    assert ModelJobConfig(model="x", precision=path).precision == path
    assert ModelSettings(source="x", precision=path).precision == path


def test_int8_is_asked_for_and_tells_its_error(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_checkpoint(tiny_esm2(hidden_size=64), tmp_path / "esm2")
    assert load_model(tmp_path / "esm2").precision_path == "fp32"
    with caplog.at_level(logging.INFO):
        model = load_model(tmp_path / "esm2", device="cpu", precision="int8")
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 3 * 6 + 1
    assert model.precision_path == "int8"
    assert "precision path int8" in caplog.text
    assert re.search(r"19 linear layers in int8: logits differ by [0-9.]+% of their spread", caplog.text)
    assert model.precision_reason in caplog.text


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("evo2_tiny", {}, ConfigError, "precision=int8 is for the linear layers of ESM-2, and evo2_tiny has none"),
        ("esm2_8m", {"device": torch.device("cuda:1")}, CapabilityError, "is to run on cuda:1: use bf16 there"),
    ],
)
def test_int8_is_for_esm2_on_a_cpu(on: Any, model: str, options: dict[str, Any], error: type, message: str):
    with pytest.raises(error, match=message):
        on("cpu", model, "int8", **options)


def test_int8_contradicts_other_weights(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"precision=int8 and dtype=.* contradict each other"):
        load_model(tmp_path, dtype=torch.bfloat16, precision="int8")
