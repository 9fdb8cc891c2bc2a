"""Linear maps whose product may run in FP8, for inference.

Both operands are rounded to E4M3 after a multiplication with per-tensor scales that never change: those stored in the
checkpoint, or 1. Four paths compute the product:

- ``transformer_engine``: NVIDIA's library, with the delayed-scaling recipe of the published code;
- ``scaled_mm``: the same cuBLASLt product through PyTorch, where that library is missing;
- ``emulated``: the same rounding on any device, products summed in fp32;
- ``hopper_emulated``: the same, products summed as Hopper's fast accumulation does.

Rows are independent of each other on every path. The hardware paths get the rows padded with zeros to a multiple of 16.

What the paths were compared with, and what never was, is said in ``e4m3`` and ``fp8_hardware``. Training does without
FP8, whatever the weights were made with: a gradient through these paths is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from torch import nn

from cistron.errors import CapabilityError
from cistron.models.layers.buffers import Fp32Buffers
from cistron.models.layers.e4m3 import product_as_hopper, product_in_fp32, round_to_e4m3
from cistron.models.layers.fp8_hardware import ALIGNMENT, HardwarePath, TransformerEngine, aligned, scaled_mm
from cistron.models.layers.linear import Linear

Fp8Path: TypeAlias = HardwarePath | Literal["emulated", "hopper_emulated"]

_EMULATIONS: Final[Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "emulated": product_in_fp32,
    "hopper_emulated": product_as_hopper,
}


class StaticScales(Fp32Buffers):
    """The stored scales of a projection, [] each: what its input and its weight are multiplied with."""

    input_scale: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("weight_scale", torch.ones(()))


class Fp8Projection(Linear):
    """A linear map without bias that multiplies in the weights' dtype until :func:`set_fp8_path` says otherwise.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        stored_scales: whether the checkpoint holds the scales; they are 1 otherwise.
    """

    def __init__(self, in_features: int, out_features: int, *, stored_scales: bool) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.fp8: StaticScales | None = StaticScales() if stored_scales else None
        self.path: Fp8Path | None = None
        self._rounded: _RoundedWeight | None = None
        self._engine: TransformerEngine | None = None

    def forward(self, x: torch.Tensor, *, by_channel: bool = False) -> torch.Tensor:
        """Map [..., K] to [..., N].

        Args:
            x: the input.
            by_channel: let the result lie in memory channel by channel, tokens of one channel side by side; the FP8
                paths have their own order and disregard it.
        """
        if self.path is None and not by_channel:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        if self.path is None:
            return (self.weight @ rows.T).T.view(*x.shape[:-1], self.out_features)
        product: torch.Tensor = _InferenceOnly.apply(rows, self.weight, self._multiply)  # type: ignore[no-untyped-call]
        return product.view(*x.shape[:-1], self.out_features)

    @property
    def multiplies_by_weight(self) -> bool:
        """Whether the product is that of the weight itself, and not of its FP8 form."""
        return self.path is None

    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scales of input and weight, [] fp32 each."""
        if self.fp8 is not None:
            return self.fp8.input_scale, self.fp8.weight_scale
        one = torch.ones((), device=self.weight.device)
        return one, one

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Map [T, K] to [T, N] on the chosen FP8 path."""
        input_scale, weight_scale = self.scales()
        if self.path == "transformer_engine":
            if self._engine is None or not self._engine.is_of(self.weight):
                self._engine = TransformerEngine(self.weight)
            return self._engine(aligned(rows), input_scale, weight_scale)[: len(rows)]
        inverse = input_scale.reciprocal() * weight_scale.reciprocal()
        weight = self._rounded_weight(weight_scale)
        if self.path == "scaled_mm":
            return scaled_mm(round_to_e4m3(aligned(rows), input_scale), weight, inverse, rows.dtype)[: len(rows)]
        product = _EMULATIONS[str(self.path)](round_to_e4m3(rows, input_scale), weight)
        return (product * inverse).to(rows.dtype)

    def _rounded_weight(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the weight in E4M3, rounded again whenever the weight or a stored scale is another one."""
        sources = [self.weight, *self.buffers()]
        if self._rounded is None or not self._rounded.is_of(sources):
            self._rounded = _RoundedWeight(round_to_e4m3(self.weight.detach(), scale), sources)
        return self._rounded.weight

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be made again: copies and pickles need not hold the weight twice."""
        return {**super().__getstate__(), "_rounded": None, "_engine": None}


def set_fp8_path(model: nn.Module, path: Fp8Path | None) -> None:
    """Let all projections of `model` multiply on `path`; None is the dtype of the weights.

    Raises:
        CapabilityError: a hardware path, and a projection whose widths are no multiples of 16.
    """
    projections = [module for module in model.modules() if isinstance(module, Fp8Projection)]
    for projection in projections:
        if path in get_args(HardwarePath):
            _check_widths(projection)
    for projection in projections:
        projection.path = path


class _RoundedWeight:
    """The E4M3 form of a weight, and what it was made from."""

    def __init__(self, weight: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
        self.weight = weight
        self._sources = sources  # Held so that their identity cannot be taken over by others.
        self._states = [_state(source) for source in sources]

    def is_of(self, sources: Sequence[torch.Tensor]) -> bool:
        same = all(held is source for held, source in zip(self._sources, sources, strict=True))
        return same and self._states == [_state(source) for source in sources]


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """Return numbers that change when the content does; tensors made in inference mode cannot count their changes."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class _InferenceOnly(torch.autograd.Function):
    """A product that takes no part in gradients: rounding has none, and the paths are made for inference."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Multiply; autograd is off in here, and autocast must be, or it would shorten the sums."""
        with torch.autocast(rows.device.type, enabled=False):
            return multiply(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Refuse: a silent zero would train the wrong thing."""
        raise CapabilityError(
            "FP8 projections are for inference and give no gradients; load the model with precision=bf16 or fp32, "
            "which trains without FP8"
        )


def _check_widths(projection: Fp8Projection) -> None:
    widths = projection.in_features, projection.out_features
    if any(width % ALIGNMENT for width in widths):
        raise CapabilityError(
            f"FP8 hardware multiplies matrices whose sides are multiples of {ALIGNMENT}, and this projection maps "
            f"{widths[0]} to {widths[1]} channels; use precision=fp8_emulated"
        )
