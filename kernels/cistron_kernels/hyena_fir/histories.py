"""What the filters remember after a call, read off the ends of its inputs: nothing as long as the input is made.

The kernels return outputs only; these few tokens are PyTorch's, gradients included.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from cistron_kernels.hyena_fir.reference import split_projection


def last_inputs(
    x: torch.Tensor, history: torch.Tensor | None, lengths: torch.Tensor | None, count: int
) -> torch.Tensor:
    """Return the inputs [B, C, count] up to each row's own last real token, `history` and then zeros before them.

    Args:
        x: [B, C, L].
        history: [B, C, N], the inputs before `x`.
        lengths: [B], real tokens of each row; none means L.
        count: how many.
    """
    batch, channels, length = x.shape
    if lengths is None and length >= count:
        return x[..., length - count :].clone()
    past = x.new_zeros(batch, channels, count)
    if history is not None and (known := min(count, history.shape[-1])):
        past = torch.cat([past[..., known:], history[..., history.shape[-1] - known :].to(x.dtype)], dim=-1)
    if lengths is None:
        return torch.cat([past[..., length:], x], dim=-1)
    index = (lengths[:, None] + torch.arange(-count, 0, device=x.device))[:, None].expand(-1, channels, -1)
    before = past.gather(-1, (index + count).clamp(max=count - 1))
    return torch.where(index < 0, before, x.gather(-1, index.clamp(min=0)))


def last_gated_inputs(
    projected: torch.Tensor,
    projection_taps: torch.Tensor,
    projection_history: torch.Tensor | None,
    history: torch.Tensor | None,
    lengths: torch.Tensor | None,
    count: int,
) -> torch.Tensor:
    """Return the last `count` products of pre-gate and value [B, D, count], as `last_inputs` does for one input."""
    reach = projection_taps.shape[1] - 1
    tail = last_inputs(projected, projection_history, lengths, count + reach)
    wide = torch.promote_types(tail.dtype, torch.float32)
    with torch.autocast(tail.device.type, enabled=False):
        filtered = functional.conv1d(tail.to(wide), projection_taps[:, None].to(wide), groups=len(projection_taps))
    _, pre_gate, value = split_projection(filtered.to(tail.dtype))
    gated = pre_gate * value
    if lengths is None:
        missing = max(count - projected.shape[-1], 0)
        # Tokens before the first one have no gates; what they left is in the history.
        return last_inputs(gated[..., missing:], history, None, count) if missing else gated
    number = lengths.clamp(max=count)
    aligned = gated.gather(-1, _from_the_right(number, count, gated))
    return last_inputs(aligned, history, number, count)


def _from_the_right(number: torch.Tensor, count: int, like: torch.Tensor) -> torch.Tensor:
    """Return the index that moves the last `number` of `count` columns of each row to the left end."""
    index = (torch.arange(count, device=number.device) + count - number[:, None]).clamp(max=count - 1)
    return index[:, None].expand(-1, like.shape[1], -1)
