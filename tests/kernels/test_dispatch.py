from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cistron_kernels import dispatch

ROOT = Path(__file__).parents[2]
OPS = sorted(path.parent.name for path in ROOT.glob("kernels/cistron_kernels/*/reference.py"))


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.delenv("CISTRON_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


@pytest.mark.parametrize(
    ("asked", "backend", "reason"),
    [
        (None, "torch", "Triton is interpreted: slow, for tests only"),
        ("auto", "torch", "Triton is interpreted: slow, for tests only"),
        ("torch", "torch", "CISTRON_KERNELS=torch"),
        ("triton", "triton", "Triton's interpreter"),
    ],
)
def test_the_environment_decides_in_the_interpreter(asked, backend, reason, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    if asked is not None:
        monkeypatch.setenv("CISTRON_KERNELS", asked)
    made = dispatch.decision("glu")
    assert made.backend == backend
    assert made.reason.startswith(reason)
    assert dispatch.takes_triton("glu", torch.zeros(2)) == (backend == "triton")


@pytest.mark.parametrize("asked", ["auto", "triton", "torch"])
def test_without_a_gpu_or_triton(asked: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CISTRON_KERNELS", asked)
    for obstacle, prepare in {
        "no NVIDIA GPU is visible": lambda: monkeypatch.delenv("TRITON_INTERPRET"),
        "triton is not installed": lambda: monkeypatch.setattr("importlib.util.find_spec", lambda _: None),
    }.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(dispatch, "_decisions", {})
        prepare()
        if asked == "triton":
            with pytest.raises(RuntimeError, match=f"CISTRON_KERNELS=triton, but {obstacle}"):
                dispatch.decision("glu")
        else:
            reason = obstacle if asked == "auto" else "CISTRON_KERNELS=torch"
            assert dispatch.decision("glu") == dispatch.Decision("torch", reason)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), dispatch.Decision("triton", "Some GPU")),
        ((8, 0), dispatch.Decision("triton", "Some GPU")),
        ((7, 5), dispatch.Decision("torch", "the GPU is sm_75, and the kernels want sm_80 or newer")),
    ],
)
def test_gpus_by_their_generation(capability, expected, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    pretend_gpu(monkeypatch, capability)
    assert dispatch.decision("glu") == expected
    assert not dispatch.takes_triton("glu", torch.zeros(2))  # This tensor is in host memory all the same.


def test_an_unknown_value_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CISTRON_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"CISTRON_KERNELS='cuda' \(allowed: auto, triton, torch\)"):
        dispatch.decision("glu")


def test_a_decision_is_made_and_logged_once_for_each_op(caplog: pytest.LogCaptureFixture, monkeypatch):
    with caplog.at_level(logging.INFO, logger="cistron_kernels"):
        first = dispatch.decision("glu")
        monkeypatch.setenv("CISTRON_KERNELS", "torch")  # Too late for glu.
        assert dispatch.decision("glu") is first
        dispatch.decision("rope")
    assert [record.getMessage() for record in caplog.records] == [
        f"op glu runs on torch: {first.reason}",
        "op rope runs on torch: CISTRON_KERNELS=torch",
    ]


def test_overrides_nest_and_end():
    def backends() -> list[str]:
        return [dispatch.decision(op).backend for op in ("glu", "rope")]

    before = backends()
    with dispatch.override("triton"):
        assert backends() == ["triton", "triton"]
        with dispatch.override("torch", "rope"):
            assert backends() == ["triton", "torch"]
        assert backends() == ["triton", "triton"]
    with dispatch.override("triton", "rope"):
        assert dispatch.decision("rope") == dispatch.Decision("triton", "overridden", by_name=True)
    with pytest.raises(KeyError), dispatch.override("triton"):
        raise KeyError
    assert backends() == before


def test_kernels_take_no_fp64_and_no_mixture_of_devices():
    x = torch.zeros(2)
    with dispatch.override("triton"):
        assert dispatch.takes_triton("glu", x, x.bfloat16(), x.half())
        assert not dispatch.takes_triton("glu", x, x.double())
        assert not dispatch.takes_triton("glu", x, x.to("meta"))


def test_the_package_works_where_triton_cannot_be_imported(tmp_path: Path):
    (tmp_path / "triton.py").write_text("raise ImportError('there is no triton here')")
    program = f"""
import importlib, sys
import cistron_kernels.dispatch
assert "torch._dynamo" not in sys.modules, "the compiler was imported, which takes seconds"
for op in {OPS!r}:
    importlib.import_module(f"cistron_kernels.{{op}}")
assert "triton" not in sys.modules, "a kernel was imported"
import torch
from cistron_kernels.rms_norm import rms_norm
y = rms_norm(torch.ones(2, 4), torch.ones(4), eps=0.0, eps_inside=True)
assert torch.equal(y, torch.ones(2, 4))
"""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CISTRON_KERNELS")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch):
    decisions = []
    for value in ("", "auto"):
        monkeypatch.setenv("CISTRON_KERNELS", value)
        monkeypatch.setattr(dispatch, "_decisions", {})
        decisions.append(dispatch.decision("glu"))
    assert decisions[0] == decisions[1]
