"""What the filters remember after a call, read off the ends of its inputs: nothing as long as the input is made.

The kernels return outputs only; these few tokens are PyTorch's, gradients included.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from cistron_kernels.hyena_fir.reference import split_projection
from cistron_kernels.rows import last_inputs


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
