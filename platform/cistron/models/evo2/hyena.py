"""The three operators of Hyena layers: HCS (7 taps), HCM (128 taps), HCL (16 decaying exponentials).

One projection gives each channel three neighbouring rows; a short filter runs over all of them, and only then are they
told apart: post-gate, pre-gate, value. The operators differ in their conventions, which the checkpoints fix: HCS stores
the current token's tap last, HCM first; HCM adds its skip term in fp32, HCL in the dtype of the activations.

Filters run channel-major, [B, C, L], gates and short filter included. Each continues from its state and updates it, so
one definition serves whole sequences and chunks; single steps have their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, Self, cast

import torch
from torch import nn

from cistron.models.evo2.cache import FirState, HyenaState
from cistron.models.evo2.config import Evo2Config
from cistron_kernels.decode_step import gated_fir_step, gated_modal_step
from cistron_kernels.hyena_fir import TapOrder, gated_fir
from cistron_kernels.modal_scan import gated_modal_scan

_HALF_PRECISIONS = (torch.bfloat16, torch.float16)


class Fp32Module(nn.Module):
    """A module that moves between devices but stays in fp32 when the model is cast to a half precision."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Apply `fn` as ``nn.Module`` does for every cast and move, except that halving the precision has no effect."""

        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            halved = applied.dtype in _HALF_PRECISIONS and tensor.dtype not in _HALF_PRECISIONS
            return tensor.to(applied.device) if halved else applied

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]


class Operator(Protocol):
    """What stands between the two projections of a layer."""

    def __call__(
        self,
        projected: torch.Tensor,
        projection_taps: torch.Tensor,
        *,
        state: HyenaState | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map projected rows [B, 3H, L] to gated outputs [B, H, L].

        Args:
            projected: the three rows of a channel are neighbours.
            projection_taps: [3H, P], of the short filter.
            state: updated in place to that after each row's last real token.
            lengths: [B], real tokens of each row; all if None.
        """
        ...

    def step(self, projected: torch.Tensor, projection_taps: torch.Tensor, state: HyenaState) -> torch.Tensor:
        """Map one projected token [B, 3H] to the gated output [B, H], short filter and gates included, in place."""
        ...


class HcsFilter(nn.Module):
    """A few taps per group of channels, in correlation order; NVIDIA's variant adds a skip term per group."""

    order: ClassVar[TapOrder] = "correlation"

    def __init__(self, config: Evo2Config) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.empty(config.num_filter_groups, config.hcs_filter_length))
        self.skip: nn.Parameter | None = None
        if config.hcs_bias:
            self.skip = nn.Parameter(torch.empty(config.num_filter_groups))

    def forward(
        self,
        projected: torch.Tensor,
        projection_taps: torch.Tensor,
        *,
        state: HyenaState | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map projected rows [B, 3H, L] to gated outputs [B, H, L]; the state holds the last inputs of both filters."""
        filters = projection_taps, self.taps
        return fir(projected, *filters, order=self.order, skip=self.skip, state=state, lengths=lengths)

    def step(self, projected: torch.Tensor, projection_taps: torch.Tensor, state: HyenaState) -> torch.Tensor:
        """Map one projected token [B, 3H] to the gated output [B, H]."""
        return fir_step(projected, projection_taps, self.taps, state, order=self.order, skip=self.skip)


class HcmFilter(nn.Module):
    """A medium filter per group of channels, in impulse order, and a skip term per channel."""

    order: ClassVar[TapOrder] = "impulse"

    def __init__(self, config: Evo2Config) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.empty(config.num_filter_groups, config.hcm_filter_length))
        self.skip = nn.Parameter(torch.empty(config.hidden_size))

    def effective_taps(self) -> torch.Tensor:
        """Return the filter itself, [G, K]."""
        return self.taps

    def forward(
        self,
        projected: torch.Tensor,
        projection_taps: torch.Tensor,
        *,
        state: HyenaState | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map projected rows [B, 3H, L] to gated outputs [B, H, L]; the state holds the last inputs of both filters."""
        filters = projection_taps, self.effective_taps()
        return fir(projected, *filters, order=self.order, skip=self.skip, state=state, lengths=lengths)

    def step(self, projected: torch.Tensor, projection_taps: torch.Tensor, state: HyenaState) -> torch.Tensor:
        """Map one projected token [B, 3H] to the gated output [B, H]."""
        return fir_step(projected, projection_taps, self.effective_taps(), state, order=self.order, skip=self.skip)


class HcmTrainingFilter(Fp32Module, HcmFilter):
    """HCM as trained: free taps under a fixed decay, in fp32 because fresh taps are about 1e-7."""

    def __init__(self, config: Evo2Config) -> None:
        super().__init__(config)
        self.decay: torch.Tensor
        self.register_buffer("decay", torch.empty(self.taps.shape, dtype=torch.float32))

    def effective_taps(self) -> torch.Tensor:
        """Return the filter itself, [G, K]."""
        return decayed_taps(self.taps, self.decay)


class HclFilter(Fp32Module):
    """An infinite filter: a sum of real decaying exponentials per channel, evaluated as a recurrence; fp32."""

    def __init__(self, config: Evo2Config) -> None:
        super().__init__()
        shape = (config.hidden_size, config.state_size)
        self.residues = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(config.hidden_size, dtype=torch.float32))
        self._make_poles(shape)

    def _make_poles(self, shape: tuple[int, int]) -> None:
        self.log_poles = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def effective_log_poles(self) -> torch.Tensor:
        """Return the logarithms of the poles, [H, S], all negative."""
        return self.log_poles

    def forward(
        self,
        projected: torch.Tensor,
        projection_taps: torch.Tensor,
        *,
        state: HyenaState | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map projected rows [B, 3H, L] to gated outputs [B, H, L]; the operator's state is [B, H, S]."""
        filters = projection_taps, self.effective_log_poles(), self.residues, self.skip
        if state is None:
            return gated_modal_scan(projected, *filters)[0]
        y, last, state.operator = gated_modal_scan(
            projected,
            *filters,
            projection_history=state.projection.last(),
            state=cast("torch.Tensor", state.operator),
            lengths=lengths,
        )
        state.projection = FirState.of(last.to(state.projection.inputs.dtype))
        return y

    def step(self, projected: torch.Tensor, projection_taps: torch.Tensor, state: HyenaState) -> torch.Tensor:
        """Map one projected token [B, 3H] to the gated output [B, H]."""
        modal, ring = cast("torch.Tensor", state.operator), state.projection
        filters = projection_taps, self.effective_log_poles(), self.residues, self.skip
        return gated_modal_step(projected, *filters, ring.inputs, modal, ring.next_slot())


class HclTrainingFilter(HclFilter):
    """HCL as trained: poles are the product of two exponentials."""

    def _make_poles(self, shape: tuple[int, int]) -> None:
        self.gamma = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.p = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def effective_log_poles(self) -> torch.Tensor:
        """Return the logarithms of the poles, [H, S], all negative."""
        return factored_log_poles(self.gamma, self.p)


def fir(
    projected: torch.Tensor,
    projection_taps: torch.Tensor,
    taps: torch.Tensor,
    *,
    order: TapOrder,
    skip: torch.Tensor | None,
    state: HyenaState | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """Run an HCS or HCM layer between its projections, [B, 3H, L] -> [B, H, L]."""
    if state is None:
        return gated_fir(projected, projection_taps, taps, order=order, skip=skip)[0]
    first, ring = state.projection, cast("FirState", state.operator)
    y, last_projected, last = gated_fir(
        projected,
        projection_taps,
        taps,
        order=order,
        skip=skip,
        projection_history=first.last(),
        history=ring.last(),
        lengths=lengths,
    )
    state.projection, state.operator = (
        FirState.of(last_projected.to(first.inputs.dtype)),
        FirState.of(last.to(ring.inputs.dtype)),
    )
    return y


def fir_step(
    projected: torch.Tensor,
    projection_taps: torch.Tensor,
    taps: torch.Tensor,
    state: HyenaState,
    *,
    order: TapOrder,
    skip: torch.Tensor | None,
) -> torch.Tensor:
    """Run one token of an HCS or HCM layer between its projections, [B, 3H] -> [B, H]."""
    first, ring = state.projection, cast("FirState", state.operator)
    slots = first.next_slot(), ring.next_slot()
    return gated_fir_step(projected, projection_taps, taps, first.inputs, ring.inputs, *slots, order=order, skip=skip)


def decayed_taps(taps: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Return HCM's filter from its training form."""
    return taps * decay


def factored_log_poles(gamma: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return HCL's log poles from their training form."""
    return -p.exp() * gamma.exp()
