"""Compare an op's Triton kernels with its fp64 reference: outputs, gradients, stray reads and writes, repeatability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cistron_kernels.dispatch import override

FENCE = 512
"""Elements of NaN on either side of a tensor."""
FORWARD, BACKWARD = 1e-5, 1e-4
"""Largest relative error, by norm, of outputs and of gradients in fp32."""


def compare(
    op: Callable[..., Any],
    tensors: Mapping[str, torch.Tensor | None],
    *,
    forward: float = FORWARD,
    backward: float = BACKWARD,
    **options: Any,
) -> None:
    """Run `op` by kernels on fp32 and by its reference on fp64; compare all outputs, and the gradients of all inputs.

    Kernels run twice, and must give the same bits; their memory is poisoned, and fenced with NaN on both sides.
    """
    wide = {name: _converted(tensor, torch.float64) for name, tensor in tensors.items()}
    narrow = {name: fenced(_converted(tensor, torch.float32)) for name, tensor in tensors.items()}
    with override("torch"):
        want, want_grads = outputs_and_gradients(op, wide, options)
    with override("triton"), guarded_memory():
        got, got_grads = outputs_and_gradients(op, narrow, options)
        again, grads_again = outputs_and_gradients(op, narrow, options)
    for i, output in enumerate(want):
        assert_close(got[i], output, forward, f"output {i}")
        assert torch.equal(got[i], again[i]), f"output {i} differs between two runs"
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert_close(got_grads[name], grad, backward, f"gradient of {name}")
        assert torch.equal(got_grads[name], grads_again[name]), f"the gradient of {name} differs between two runs"


def outputs_and_gradients(
    op: Callable[..., Any], tensors: Mapping[str, torch.Tensor | None], options: Mapping[str, Any]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return the outputs, and the gradients of floating-point inputs for cotangents that are the same at each call."""
    leaves = {name: _leaf(tensor) for name, tensor in tensors.items()}
    outputs = op(**leaves, **options)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y is not None]
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y) for y in outputs]
    pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    return [y.detach() for y in outputs], grads


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    """Assert that `got` was written everywhere, and differs by at most `tolerance` of the norm of `want`."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} is not {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what} is not finite: something was not written, or stray memory was read"
    error = torch.linalg.vector_norm(got.double() - want.double())
    scale = torch.linalg.vector_norm(want.double()).clamp_min(1e-30)
    assert error <= tolerance * scale, f"{what} is off by {float(error / scale):.2e} (allowed {tolerance:.0e})"


def fenced(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy, with the same strides, that stands in the middle of NaN (integers: of numbers far outside)."""
    if tensor is None:
        return None
    _, copy = _fenced_like(tensor)
    return copy.copy_(tensor)


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Fill what is allocated on the CPU with NaN, fence it, and fail where something was written around or between."""
    buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def new_empty(tensor: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        return torch.empty(*size, **{"dtype": tensor.dtype, "device": tensor.device, **options})

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _guarded(getattr(torch, name), buffers))
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield
    for buffer, outside in buffers:
        assert _is_poison(buffer[outside]).all(), "a kernel wrote outside of its output"


def _guarded(
    real: Callable[..., torch.Tensor], buffers: list[tuple[torch.Tensor, torch.Tensor]]
) -> Callable[..., torch.Tensor]:
    """Return an allocating function of torch that fences tensors on the CPU, and lists what is to remain as it is."""

    def allocate(*args: Any, device: torch.device | str | None = None, **options: Any) -> torch.Tensor:
        device = args[0].device if device is None and isinstance(args[0], torch.Tensor) else device
        if torch.device(device or "cpu").type != "cpu":
            return real(*args, device=device, **options)
        buffer, tensor = _fenced_like(real(*args, device="meta", **options))
        outside = torch.ones(len(buffer), dtype=torch.bool)
        outside.as_strided(tensor.shape, tensor.stride(), FENCE).fill_(False)
        buffers.append((buffer, outside))
        return tensor

    return allocate


def _fenced_like(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return poison, and a tensor like another (which may be meta) in the middle of it."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    buffer = torch.full((span + 2 * FENCE,), _poison(like.dtype), dtype=like.dtype)
    return buffer, buffer.as_strided(like.shape, like.stride(), FENCE)


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def _is_poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.isnan() if tensor.is_floating_point() else tensor == _poison(tensor.dtype)


def _converted(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


def _leaf(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())
