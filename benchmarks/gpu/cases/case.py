"""What a case is: an op, the tensors it gets, what it must move at least, and who else computes the same."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import torch

Family = Literal["evo2", "esm2"]
Work = Literal["training", "decoding"]
Tensors: TypeAlias = dict[str, torch.Tensor]
Layout: TypeAlias = Callable[[Tensors], Tensors]
"""Lays the same numbers out in another way that the op takes."""

BF16_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a published model that its ops see."""

    name: str
    width: int
    heads: int
    inner: int
    groups: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Shape:
    """How much an op gets: `batch` rows of `length` tokens at the sizes of `model`."""

    model: Model
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return self.batch * self.length


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the same GPU reached in the same run: a large copy, bytes read and written, and a large bf16 product."""

    copy_bytes: float
    gemm_flops: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that an op must do: every operand read or written once, and its matrix products."""

    bytes: float
    flops: float = 0.0

    def least_seconds(self, ceilings: Ceilings) -> float:
        """Return the time that the slower of both ceilings allows."""
        return max(self.bytes / ceilings.copy_bytes, self.flops / ceilings.gemm_flops)


class Draw:
    """Random tensors on one device: activations and most parameters in `dtype`, HCL's parameters always in fp32."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Draw from N(0, scale^2)."""
        drawn = torch.randn(size, generator=self._generator, device=self.device, dtype=dtype or self.dtype)
        return drawn if scale == 1.0 else drawn.mul_(scale)

    def log_poles(self, *size: int) -> torch.Tensor:
        """Draw logarithms of poles that forget within one to 10,000 tokens, fp32."""
        exponents = torch.rand(size, generator=self._generator, device=self.device) * -4.0
        return -torch.pow(10.0, exponents)

    def ids(self, *size: int, below: int) -> torch.Tensor:
        """Draw int64 ids."""
        return torch.randint(below, size, generator=self._generator, device=self.device)


@dataclass(frozen=True)
class Peer:
    """Another library's form of a case.

    Attributes:
        name: the library's, as `importlib.metadata` knows it.
        load: imports it and returns a function with the case's parameter names; ImportError where it is not installed.
        adapt: brings the case's tensors into the library's form, outside of what is timed.
        whole: its forward pass also computes the gradient, so only the sum of both passes compares.
        in_place: it overwrites its inputs, so each call gets copies, which are made outside of what is timed.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    adapt: Layout = dict
    whole: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class Case:
    """One row of the table of ops.

    Attributes:
        name: how the table calls it.
        op: folder of `cistron_kernels`.
        function: public function in it.
        family: whose models' sizes it is timed at.
        inputs: draws its tensors, by parameter name.
        forward: the least that the forward pass does.
        backward: likewise; None for what has no gradient.
        options: its other arguments.
        gradients: inputs whose gradient is wanted.
        outputs: how many of its results get a gradient from above.
        states: inputs that it updates in place.
        layouts: the forms of its inputs that are checked; the first one is timed.
        asked: shares of the ceiling that are asked for, forward and backward.
        peers: other libraries.
        imported: torch's own kernel is meant to run in half precision, so no Triton kernel is missed.
        compiled: torch.compile is compared; not for what updates state in place, one token at a time.
        steps: it takes single tokens, and is timed at the plan's rows instead of its tokens.
        works: what its family's models run it in, whose figures are withheld unless it passed; none for a part that
            they run fused with others.
    """

    name: str
    op: str
    function: str
    family: Family
    inputs: Callable[[Shape, Draw], Tensors]
    forward: Callable[[Shape], Cost]
    backward: Callable[[Shape], Cost] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    outputs: int = 1
    states: tuple[str, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=lambda: {"as drawn": dict})
    asked: tuple[float | None, float | None] = (None, None)
    peers: tuple[Peer, ...] = ()
    imported: bool = False
    compiled: bool = True
    steps: bool = False
    works: tuple[Work, ...] = ("training", "decoding")

    def public(self) -> Callable[..., Any]:
        """Return the op's public function.

        Raises:
            NotImplementedError: it, or its Triton form, does not exist.
        """
        module = importlib.import_module(f"cistron_kernels.{self.op}")
        if not hasattr(module, self.function):
            raise NotImplementedError(f"cistron_kernels.{self.op} has no {self.function}")
        if importlib.util.find_spec(f"cistron_kernels.{self.op}.kernel") is None:
            raise NotImplementedError(f"cistron_kernels.{self.op} has no Triton form")
        return getattr(module, self.function)

    def timed_inputs(self, shape: Shape, draw: Draw) -> Tensors:
        """Draw the tensors in the layout that is timed."""
        return next(iter(self.layouts.values()))(self.inputs(shape, draw))


def results(found: Any) -> list[torch.Tensor]:
    """Return what an op returned as a list of tensors."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def leaves(tensors: Tensors, gradients: Sequence[str]) -> Tensors:
    """Return the tensors detached, those named in `gradients` wanting one."""
    return {name: tensor.detach().requires_grad_(name in gradients) for name, tensor in tensors.items()}


def flattened(*names: str) -> Layout:
    """Return the layout that packs the named [B, L, ...] tensors to [T, ...]."""

    def pack(tensors: Tensors) -> Tensors:
        return {**tensors, **{name: tensors[name].flatten(0, 1) for name in names if name in tensors}}

    return pack


def offsets(lengths: Sequence[int]) -> torch.Tensor:
    """Return cu_seqlens, int32 in host memory."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `want`; NaN and other shapes are infinitely wrong."""
    if got.shape != want.shape:
        return math.inf
    wide = torch.float64 if want.dtype == torch.float64 else torch.float32
    difference = torch.linalg.vector_norm(got.to(wide) - want.to(wide))
    error = float(difference / torch.linalg.vector_norm(want.to(wide)).clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf
