"""The Hyena mixer and its three operators: HCS (7 taps), HCM (128 taps), HCL (16 decaying exponentials).

One projection gives each channel three neighbouring rows; a short filter runs over all of them, and only then are they
told apart: post-gate, pre-gate, value. The operators differ in their conventions, which the checkpoints fix: HCS stores
the current token's tap last, HCM first; HCM adds its skip term in fp32, HCL in the dtype of the activations.

Filters run channel-major, [B, C, L]. Each takes and returns its state, so one definition serves whole sequences, chunks
and single steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, Self, cast

import torch
from torch import nn

from cistron.models.evo2.cache import FirState, HyenaState
from cistron.models.evo2.config import HCL, HCM, HCS, Evo2Config
from cistron.models.evo2.layout import Layout
from cistron.models.layers.fp8 import Fp8Projection
from cistron.models.layers.linear import Linear
from cistron_kernels.decode_step import gated_fir_step, gated_modal_step
from cistron_kernels.hyena_fir import TapOrder, hyena_fir
from cistron_kernels.modal_scan import modal_scan

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
    """What stands between the two gates."""

    def __call__(
        self, z: torch.Tensor, *, state: FirState | torch.Tensor | None, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, FirState | torch.Tensor]:
        """Map z [B, H, L] to y [B, H, L] and the state after each row's last real token, which may reuse `state`."""
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
        self, z: torch.Tensor, *, state: FirState | None = None, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, FirState | None]:
        """Filter z [B, H, L]; the state holds the last inputs."""
        return filtered(z, self.taps, order=self.order, skip=self.skip, state=state, lengths=lengths)

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
        self, z: torch.Tensor, *, state: FirState | None = None, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, FirState | None]:
        """Filter z [B, H, L]; the state holds the last inputs."""
        return filtered(z, self.effective_taps(), order=self.order, skip=self.skip, state=state, lengths=lengths)

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
        self, z: torch.Tensor, *, state: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Filter z [B, H, L]; the state is [B, H, S]."""
        y, state = modal_scan(z, self.effective_log_poles(), self.residues, state=state, lengths=lengths)
        return y + self.skip.to(z.dtype)[:, None] * z, state

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


class HyenaMixer(nn.Module):
    """Projection, short filter, gate, operator, gate, projection."""

    def __init__(self, config: Evo2Config, symbol: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.projection = Fp8Projection(width, 3 * width, stored_scales=config.fp8_scales)
        self.projection_taps = nn.Parameter(torch.empty(3 * width, config.short_filter_length))
        self.filter = make_filter(config, symbol)
        self.output = Linear(width, width)

    def forward(self, x: torch.Tensor, layout: Layout, state: HyenaState | None = None) -> torch.Tensor:
        """Mix along the sequence: [B, L, H] or [T, H] to the same shape; `state` is updated in place."""
        if state is not None and layout.lengths is None and x.shape[1] == 1:
            operator = cast("Operator", self.filter)
            return self.output(operator.step(self.projection(x)[:, 0], self.projection_taps, state)[:, None])
        return self.output(layout.by_document(lambda rows: self._mix(rows, layout, state), self.projection(x)))

    def _mix(self, rows: torch.Tensor, layout: Layout, state: HyenaState | None) -> torch.Tensor:
        """Map projected rows [B, L, 3H] to gated outputs [B, L, H]."""
        projected, projection_state = filtered(
            rows.transpose(1, 2),
            self.projection_taps,
            order="correlation",
            state=None if state is None else state.projection,
            lengths=layout.lengths,
        )
        post_gate, pre_gate, value = projected.view(len(rows), -1, 3, rows.shape[1]).unbind(dim=2)
        operator = cast("Operator", self.filter)
        y, operator_state = operator(
            pre_gate * value, state=None if state is None else state.operator, lengths=layout.lengths
        )
        if state is not None:
            state.projection, state.operator = cast("FirState", projection_state), operator_state
        return (post_gate * y).transpose(1, 2)


def make_filter(config: Evo2Config, symbol: str) -> nn.Module:
    """Return the operator of a layer, in the configuration's parametrization."""
    training = config.parametrization == "training"
    if symbol == HCS:
        return HcsFilter(config)
    if symbol == HCM:
        return HcmTrainingFilter(config) if training else HcmFilter(config)
    assert symbol == HCL, f"{symbol!r} is not a Hyena layer"
    return HclTrainingFilter(config) if training else HclFilter(config)


def filtered(
    x: torch.Tensor,
    taps: torch.Tensor,
    *,
    order: TapOrder,
    skip: torch.Tensor | None = None,
    state: FirState | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, FirState | None]:
    """Run a finite filter over [B, C, L]."""
    if state is None:
        return hyena_fir(x, taps, order=order, skip=skip)[0], None
    y, last = hyena_fir(x, taps, order=order, skip=skip, history=state.last(), lengths=lengths)
    return y, FirState.of(last.to(state.inputs.dtype))


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


def empty_state(config: Evo2Config, symbol: str, batch_size: int, like: torch.Tensor) -> HyenaState:
    """Return the state of a Hyena layer before the first token; `like` gives device and dtype."""
    width = config.hidden_size
    projection = FirState.of(like.new_zeros(batch_size, 3 * width, config.short_filter_length - 1))
    if symbol == HCL:
        wide = torch.promote_types(like.dtype, torch.float32)
        return HyenaState(projection, like.new_zeros(batch_size, width, config.state_size, dtype=wide))
    taps = config.hcs_filter_length if symbol == HCS else config.hcm_filter_length
    return HyenaState(projection, FirState.of(like.new_zeros(batch_size, width, taps - 1)))
