"""A Hyena layer between the norms: projection, operator, projection."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from cistron.models.evo2 import hyena
from cistron.models.evo2.cache import FirState, HyenaState
from cistron.models.evo2.config import HCL, HCM, HCS, Evo2Config
from cistron.models.evo2.layout import Layout
from cistron.models.layers.fp8 import Fp8Projection
from cistron.models.layers.linear import Linear
from cistron_kernels.dispatch import takes_triton
from cistron_kernels.rows import ROW_ALIGNMENT


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
        operator = cast("hyena.Operator", self.filter)
        if state is not None and layout.lengths is None and x.shape[1] == 1:
            return self.output(operator.step(self.projection(x)[:, 0], self.projection_taps, state)[:, None])

        def mixed(rows: torch.Tensor) -> torch.Tensor:
            y = operator(rows.transpose(1, 2), self.projection_taps, state=state, lengths=layout.lengths)
            return y.transpose(1, 2)

        by_channel = self._reads_by_channel(x, layout)
        y = layout.by_document(mixed, self.projection(x, by_channel=by_channel))
        # As a matrix, the product needs no copy of rows that are stored channel by channel.
        return self.output(y.flatten(0, -2)).view(y.shape) if by_channel else self.output(y)

    def _reads_by_channel(self, x: torch.Tensor, layout: Layout) -> bool:
        """Return whether kernels run that read a projection fastest where it is stored channel by channel."""
        if layout.cu_seqlens is None:
            length = x.shape[1]
        else:  # Documents of several lengths are gathered token by token.
            length = layout.buckets[0].shape[1] if len(layout.buckets) == 1 else 1
        return length % ROW_ALIGNMENT == 0 and takes_triton("hyena_fir", x, self.projection_taps)


def make_filter(config: Evo2Config, symbol: str) -> nn.Module:
    """Return the operator of a layer, in the configuration's parametrization."""
    training = config.parametrization == "training"
    if symbol == HCS:
        return hyena.HcsFilter(config)
    if symbol == HCM:
        return hyena.HcmTrainingFilter(config) if training else hyena.HcmFilter(config)
    assert symbol == HCL, f"{symbol!r} is not a Hyena layer"
    return hyena.HclTrainingFilter(config) if training else hyena.HclFilter(config)


def empty_state(config: Evo2Config, symbol: str, batch_size: int, like: torch.Tensor) -> HyenaState:
    """Return the state of a Hyena layer before the first token; `like` gives device and dtype."""
    width = config.hidden_size
    projection = FirState.of(like.new_zeros(batch_size, 3 * width, config.short_filter_length - 1))
    if symbol == HCL:
        wide = torch.promote_types(like.dtype, torch.float32)
        return HyenaState(projection, like.new_zeros(batch_size, width, config.state_size, dtype=wide))
    taps = config.hcs_filter_length if symbol == HCS else config.hcm_filter_length
    return HyenaState(projection, FirState.of(like.new_zeros(batch_size, width, taps - 1)))
