"""What a GPU can do in FP8, and the two libraries that do it. Transformer Engine is imported here and nowhere else.

Neither has run on a GPU here: the product through PyTorch was compared with the emulation by means of PyTorch's CPU
implementation, and the calls of Transformer Engine were tested with a stand-in for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

HardwarePath = Literal["transformer_engine", "scaled_mm"]
Generation = Literal["ada", "hopper", "blackwell"]

ALIGNMENT: Final = 16
"""FP8 products want dimensions that are multiples of it."""

_GENERATIONS: Final[Mapping[int, Generation]] = {
    8: "ada",
    9: "hopper",
    10: "blackwell",
    11: "blackwell",
    12: "blackwell",
}
"""By major compute capability, where that has FP8 at all."""
_FIRST_CAPABILITY: Final = (8, 9)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a device can do.

    Attributes:
        path: how it multiplies in FP8; None if it does not.
        generation: of the GPU; None if it has no FP8.
        reason: one clause that says why.
    """

    path: HardwarePath | None
    generation: Generation | None
    reason: str


def fp8_hardware(device: torch.device) -> Hardware:
    """Return what `device` can do in FP8 with the libraries that are installed."""
    if device.type != "cuda" or torch.version.hip is not None:
        return Hardware(None, None, f"FP8 products need an NVIDIA GPU, and this is {device.type}")
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    if capability < _FIRST_CAPABILITY:
        return Hardware(None, None, f"FP8 products need compute capability 8.9, and this is {name}")
    generation = _GENERATIONS.get(capability[0])
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # It also fails when CUDA's libraries do not fit.
        logger.debug("Transformer Engine cannot be imported: %s", error)
        return Hardware("scaled_mm", generation, f"{name}, through PyTorch because Transformer Engine is not installed")
    return Hardware("transformer_engine", generation, f"{name}, through Transformer Engine")


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """Fill up [T, K] with rows of zeros to a multiple of 16."""
    return functional.pad(rows, (0, 0, 0, -len(rows) % ALIGNMENT))


def scaled_mm(x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x [T, K] times the transpose of weight [N, K], both E4M3, by cuBLASLt in fast accumulation."""
    return torch._scaled_mm(
        x, weight.t(), scale_a=inverse, scale_b=torch.ones_like(inverse), out_dtype=dtype, use_fast_accum=True
    )


class TransformerEngine:
    """The library's linear layer over a projection's own weight.

    Its fast accumulation in the forward product is the recipe's default. Its scales follow the data only when gradients
    are on; they are written again before every product all the same, because it updates those of all its layers at
    once, also for another model of the process.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        from transformer_engine import pytorch
        from transformer_engine.common.recipe import DelayedScaling, Format

        self._library, self._device = pytorch, weight.device
        self._recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, amax_compute_algo="max")
        with torch.accelerator.device_index(weight.device.index):  # It puts the scales on the current device.
            self._layer = pytorch.Linear(
                weight.shape[1], weight.shape[0], bias=False, params_dtype=weight.dtype, device=weight.device
            ).eval()
            self._layer.weight = weight
            self._layer.fp8_meta["num_gemms"] = 1
            self._layer.init_fp8_meta_tensors(self._recipe)

    def is_of(self, weight: torch.Tensor) -> bool:
        """Return whether this is the layer over `weight` where it is now."""
        return self._layer.weight is weight and self._device == weight.device

    def __call__(self, rows: torch.Tensor, input_scale: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        """Map [T, K] to [T, N] with static scales; T is a multiple of 16, and gradients are off."""
        scales = self._layer.fp8_meta["scaling_fwd"].scale
        scales[0].copy_(input_scale)
        scales[1].copy_(weight_scale)
        with torch.accelerator.device_index(self._device.index), self._autocast():
            return self._layer(rows)

    def _autocast(self) -> Any:
        if hasattr(self._library, "autocast"):
            return self._library.autocast(enabled=True, recipe=self._recipe)
        return self._library.fp8_autocast(enabled=True, fp8_recipe=self._recipe)  # Before version 2.9.
