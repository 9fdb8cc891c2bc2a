"""Which form of an op runs: its Triton kernels or its PyTorch reference; decided once per op, with the reason.

``CISTRON_KERNELS`` overrides the decision for a process: ``torch`` turns the kernels off, ``triton`` insists on them
and fails where they cannot run, ``auto`` is the default. Kernels take tensors on an NVIDIA GPU; under Triton's
interpreter (``TRITON_INTERPRET=1``) they take tensors in host memory too, for tests.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import torch

Backend: TypeAlias = Literal["triton", "torch"]

OLDEST_CAPABILITY: Final = (8, 0)
"""Ampere, the first generation with bf16 matrix instructions."""

_VARIABLE: Final = "CISTRON_KERNELS"
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)
_overrides: dict[str | None, Backend] = {}
_decisions: dict[str, Decision] = {}


@dataclass(frozen=True, slots=True)
class Decision:
    """The form of an op that runs.

    Attributes:
        backend: which one.
        reason: why, for the log and for reports.
        by_name: an override names the op, so no other library's kernel stands in for its own.
    """

    backend: Backend
    reason: str
    by_name: bool = False


def decision(op: str) -> Decision:
    """Return what was decided for an op; the first call decides and logs.

    Raises:
        ValueError: ``CISTRON_KERNELS`` is none of its values.
        RuntimeError: it asks for Triton, which cannot run here.
    """
    forced = _overrides.get(op, _overrides.get(None))
    return _decided(op) if forced is None else Decision(forced, "overridden", by_name=op in _overrides)


def takes_triton(op: str, *tensors: torch.Tensor) -> bool:
    """Return whether the op's kernels run on these tensors: on one GPU, or interpreted, and none wider than fp32."""
    if decision(op).backend == "torch":
        return False
    first = tensors[0]
    if not (first.is_cuda or _interpreted()):
        return False
    return all(tensor.dtype in _DTYPES and tensor.device == first.device for tensor in tensors)


@contextmanager
def override(backend: Backend, *ops: str) -> Iterator[None]:
    """Run the named ops, or all, on one backend inside the block; for tests and benchmarks, not across threads."""
    saved = dict(_overrides)
    _overrides.update(dict.fromkeys(ops or (None,), backend))
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(saved)


def _decided(op: str) -> Decision:
    if op not in _decisions:
        made = _decisions[op] = _decide()
        _log.info("op %s runs on %s: %s", op, made.backend, made.reason)
    return _decisions[op]


# What `torch.compiler.assume_constant_result` does, without importing the compiler, which takes seconds: a compiled
# model asks while it is traced, and neither logging nor a look at the hardware can stand in its graph.
_decided._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide() -> Decision:
    asked = os.environ.get(_VARIABLE) or "auto"
    if asked not in (allowed := ("auto", *get_args(Backend))):
        raise ValueError(f"{_VARIABLE}={asked!r} (allowed: {', '.join(allowed)})")
    if asked == "torch":
        return Decision("torch", f"{_VARIABLE}=torch")
    obstacle = _obstacle()
    if asked == "triton" and obstacle is not None:
        raise RuntimeError(f"{_VARIABLE}=triton, but {obstacle}")
    if obstacle is not None:
        return Decision("torch", obstacle)
    if _interpreted() and asked == "auto":
        return Decision("torch", f"Triton is interpreted: slow, for tests only ({_VARIABLE}=triton runs it)")
    return Decision("triton", "Triton's interpreter" if _interpreted() else torch.cuda.get_device_name())


def _obstacle() -> str | None:
    """Return why Triton cannot run in this process, if it cannot."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no NVIDIA GPU is visible"
    if (capability := torch.cuda.get_device_capability()) < OLDEST_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}, and the kernels want sm_80 or newer"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
