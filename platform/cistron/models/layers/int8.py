"""Linear layers in int8 for inference on CPUs, and what that costs in accuracy.

Weights are rounded once, with one scale per output; activations at every call, with one scale per token, so that a
token's result does not depend on what shares its batch. The sums are exact integers. Embeddings, norms, attention, the
tied output matrix and the contact head stay in fp32. Nothing is calibrated, and there is no gradient.

The product is oneDNN's, through the operators that torch's own compiler emits: torch's quantised tensors and
``quantize_dynamic`` are deprecated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from cistron.errors import CapabilityError, InputError
from cistron.models.base import SequenceModel
from cistron.models.layers.linear import GeluLinear
from cistron.tokenizers import ProteinTokenizer

SAMPLE: Final = (
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSALLSSDITASVNCAKKIVSDGNGMNAW"
    "VAWRNRCKGTDVQAWIRGCRL",
)
"""Human ubiquitin and hen egg-white lysozyme: what the error is measured on unless told otherwise."""

_LARGEST: Final = 127
_OFFSET: Final = 128
"""Rounded activations are -127 .. 127, and enter the product, which wants unsigned bytes, as 1 .. 255."""
_MASK_EVERY: Final = 7
"""About the share of residues that were masked in training, 15 %."""


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """How far the logits of an int8 model are from those in fp32.

    Attributes:
        num_layers: linear layers that run in int8.
        relative_error: norm of the difference of all logits over their spread (the norm of logits minus their mean).
        max_error: largest difference of a logit.
        perplexity: of masked residues, in fp32.
        perplexity_int8: the same in int8.
    """

    num_layers: int
    relative_error: float
    max_error: float
    perplexity: float
    perplexity_int8: float

    def __str__(self) -> str:
        """Return one line for a log."""
        return (
            f"{self.num_layers} linear layers in int8: logits differ by {self.relative_error:.1%} of their spread, "
            f"{self.max_error:.2g} at most; perplexity of masked residues {self.perplexity_int8:.3f}, "
            f"in fp32 {self.perplexity:.3f}"
        )


class Int8Linear(nn.Module):
    """A linear layer whose product is taken in int8; it holds nothing that a state dict could save.

    Args:
        linear: the layer in fp32, on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.gelu = isinstance(linear, GeluLinear)
        weight = linear.weight.detach()
        self._scale = _scales(weight)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int64)
        self._weight = torch.ops.onednn.qlinear_prepack(_rounded(weight, self._scale), None)
        bias = torch.zeros(self.out_features) if linear.bias is None else linear.bias.detach()
        self._scale, self._bias = self._scale[:, 0].contiguous(), bias.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] to [..., outputs], fp32."""
        rows = x.reshape(-1, self.in_features)
        scale = _scales(rows)
        unsigned = _rounded(rows, scale).view(torch.uint8).bitwise_xor_(_OFFSET)
        y = _product(unsigned, self._weight, self._scale, self._zeros)
        y = torch.addcmul(self._bias, y, scale, out=y)
        y = functional.gelu(y) if self.gelu else y
        return y.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise CapabilityError(f"{prefix[:-1]} is in int8 and has no weights to save: save the model it was made from")

    def extra_repr(self) -> str:
        """Describe the shape as ``nn.Linear`` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, gelu={self.gelu}"


@torch.inference_mode()
def quantize_linears(model: SequenceModel, *, sample: Sequence[str] = SAMPLE) -> QuantizationReport:
    """Replace every linear layer of an ESM-2 in fp32 on the CPU by one in int8, and report the error.

    The model can then no longer be trained or saved; its weights take a quarter of the memory.

    Args:
        model: changed in place.
        sample: proteins on which the error is measured.

    Raises:
        CapabilityError: another model, dtype or device, or a processor whose int8 products are not exact.
        InputError: no sample, or the model is in int8 already.
    """
    _check(model, sample)
    rows = [torch.from_numpy(model.tokenizer.encode(protein)) for protein in sample]
    before = _logits(model, rows)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), child, Int8Linear(linear))
    model.requires_grad_(False)
    after = _logits(model, rows)
    difference, spread = after - before, before - before.mean()
    return QuantizationReport(
        len(names),
        relative_error=float(difference.norm() / spread.norm()),
        max_error=float(difference.abs().max()),
        perplexity=_perplexity(before, rows),
        perplexity_int8=_perplexity(after, rows),
    )


def _check(model: SequenceModel, sample: Sequence[str]) -> None:
    if model.family != "esm2":
        raise CapabilityError(f"int8 is for ESM-2, and this is {model.family}")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise InputError("this model runs in int8 already")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if model.device.type != "cpu" or dtypes != {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CapabilityError(f"int8 is made from fp32 weights on the CPU, and these are {found} on {model.device}")
    if not sample:
        raise InputError("int8: give at least one protein to measure the error on")
    if not _products_are_exact():
        raise CapabilityError("int8 products are not exact on this processor or in this build of torch: use fp32")


@cache
def _products_are_exact() -> bool:
    """Return whether the largest sums come out right; old processors add pairs of products in 16 bits, and saturate."""
    has_operator = hasattr(torch.ops.onednn, "qlinear_pointwise")
    if not has_operator or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    length, outputs = 256, 16
    x = torch.full((4, length), _LARGEST + _OFFSET, dtype=torch.uint8)
    weight = torch.full((outputs, length), _LARGEST, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    y = _product(x, packed, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64))
    return bool((y == _LARGEST * _LARGEST * length).all())


def _product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Multiply x [T, inputs] uint8, less the offset, with a packed weight: [T, outputs] fp32, times `scale`."""
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, _OFFSET, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _scales(x: torch.Tensor) -> torch.Tensor:
    """Return what one step is worth in each row of [N, K]: [N, 1] fp32, positive."""
    return (x.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).round_().to(torch.int8)


def _logits(model: SequenceModel, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logits of all proteins' residues, some of them masked, [R, V]."""
    outputs = []
    for row in rows:
        ids = row.clone()
        ids[1:-1:_MASK_EVERY] = ProteinTokenizer.mask_id
        outputs.append(model(ids[None]).logits[0, 1:-1])
    return torch.cat(outputs)


def _perplexity(logits: torch.Tensor, rows: Sequence[torch.Tensor]) -> float:
    """Return the perplexity of the residues that were masked."""
    targets = torch.cat([row[1:-1] for row in rows])
    masked = torch.cat([torch.arange(len(row) - 2) % _MASK_EVERY == 0 for row in rows])
    return math.exp(float(functional.cross_entropy(logits[masked], targets[masked])))
