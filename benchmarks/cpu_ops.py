"""Ops on CPU in fp32 against the code that they replace: the formulas of the published model code, op by op.

The shapes are those of Evo 2 1B and ESM-2 650M. A state of one token is stepped; everything else is run forward, and
forward and backward. HCL's filter is given to the FFT ready made, and its gradient stops there. Every ratio is measured
twice; that, and "glu, identity", where both sides are one product, show what noise and the checks at the door can do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch
from torch.nn import functional

from benchmarks.fft import convolved, long_filters
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.cases.case import Case, Draw, Shape, Tensors, leaves, relative_error, results
from benchmarks.gpu.plan import ESM2_650M, EVO2_1B
from benchmarks.timing import KEEP_FREED_MEMORY, in_new_process, interleaved

TOKENS: Final = 2_048
STEP_ROWS: Final = 8
TOLERANCE: Final = 1e-5
ASKED: Final = ">= 1"
ROUNDS: Final = 25
_IGNORED: Final = -100


@dataclass(frozen=True)
class Replaced:
    """Published code for one case.

    Attributes:
        function: takes the case's tensors and options by name.
        adapt: brings the tensors into its form, outside of what is timed.
    """

    function: Callable[..., Any]
    adapt: Callable[[Tensors], Tensors] = dict


def run() -> list[dict[str, Any]]:
    """Return one row per op; a result that differs is an error, not a row.

    New memory would cost more than most of these ops, and differently from one run to the next.
    """
    found: list[dict[str, Any]] = in_new_process(_rows, environment=KEEP_FREED_MEMORY)
    return found


def _rows() -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    return [_row(all_cases()[name], replaced) for name, replaced in _replaced().items()]


def _row(case: Case, replaced: Replaced) -> dict[str, Any]:
    model = EVO2_1B if case.family == "evo2" else ESM2_650M
    shape = Shape(model, STEP_ROWS, 1) if case.steps else Shape(model, 1, TOKENS)
    tensors = _slots_as_numbers(case.timed_inputs(shape, Draw(torch.device("cpu"), torch.float32)))
    ours, theirs = partial(case.public(), **case.options), partial(replaced.function, **case.options)
    adapted = replaced.adapt(tensors)
    with torch.no_grad():
        got, want = (results(run(**_copied(given)))[0] for run, given in ((ours, tensors), (theirs, adapted)))
        error = relative_error(got, want)
        if error > TOLERANCE:
            raise AssertionError(f"{case.name} differs from the published formula by {error:.1e}: no speed is reported")
        ms, forward = _raced(lambda: ours(**tensors), lambda: theirs(**adapted))
    both = dict.fromkeys(forward, "")
    if case.gradients:
        _, both = _raced(
            lambda: _forward_and_backward(ours, tensors, case), lambda: _forward_and_backward(theirs, adapted, case)
        )
    return {
        "op": case.name,
        "ours, ms": ms,
        **{f"forward, {name}": ratio for name, ratio in forward.items()},
        **{f"forward and backward, {name}": ratio for name, ratio in both.items()},
        "asked": ASKED,
    }


def _raced(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, dict[str, Any]]:
    """Return our milliseconds, and how many times as fast that is, measured twice."""
    races = [
        interleaved(candidates, rounds=ROUNDS)
        for candidates in ({"ours": ours, "theirs": theirs}, {"theirs": theirs, "ours": ours})
    ]
    first, again = (round(race["theirs"] / race["ours"], 2) for race in races)
    return round(1000 * races[0]["ours"], 2), {"times as fast": first, "again": again}


def _slots_as_numbers(tensors: Tensors) -> dict[str, Any]:
    """Return the tensors with the slots of rings as Python numbers, which is how decoding on a CPU has them."""
    return {name: int(value) if name.endswith("end") else value for name, value in tensors.items()}


def _copied(tensors: dict[str, Any]) -> dict[str, Any]:
    """Steps write into their states."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}


def _forward_and_backward(run: Callable[..., Any], tensors: Tensors, case: Case) -> None:
    found = results(run(**leaves(tensors, [name for name in case.gradients if name in tensors])))[: case.outputs]
    torch.autograd.backward(found, [torch.ones_like(tensor) for tensor in found])


def _replaced() -> Mapping[str, Replaced]:
    return {
        "rms_norm": Replaced(_rms_norm),
        "add_rms_norm": Replaced(lambda x, residual, **others: (_rms_norm(x + residual, **others), x + residual)),
        "layer_norm": Replaced(_layer_norm),
        "add_layer_norm": Replaced(lambda x, residual, **others: (_layer_norm(x + residual, **others), x + residual)),
        "glu, identity": Replaced(lambda gate, value, activation: gate * value),
        "glu, gelu": Replaced(lambda gate, value, activation: functional.gelu(gate) * value),
        "bias_gelu": Replaced(_bias_gelu),
        "cross_entropy, evo2": Replaced(_cross_entropy),
        "cross_entropy, esm2": Replaced(_cross_entropy),
        "score_logprob": Replaced(_score_logprob),
        "rope_pair": Replaced(_rope_pair),
        "rotate_pair": Replaced(_rotate_pair, _doubled_angles),
        "varlen_attention, causal": Replaced(_padded_attention),
        "varlen_attention, proteins": Replaced(_padded_attention),
        "hyena_fir, projection": Replaced(_depthwise),
        "gated_fir, HCS": Replaced(_hcs),
        "gated_fir, HCM": Replaced(_hcm),
        "gated_modal_scan, HCL": Replaced(_hcl, _with_filter),
        "fir_step, HCM": Replaced(_rolled_fir_step, _channel_major_state),
        "modal_step": Replaced(_modal_step),
    }


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, eps_inside: bool) -> torch.Tensor:
    return weight * (x / (x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + eps))


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def _bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    x = x + bias
    return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = functional.cross_entropy(logits, targets, ignore_index=_IGNORED, reduction="none")
    return (losses * weights).sum(), weights[targets != _IGNORED].sum()


def _score_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def _rope_pair(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(positions.float(), inv_freq).repeat(1, 2)[:, None]
    return _rotate_pair(q, k, angles.cos(), angles.sin())


def _rotate_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return rotate(q), rotate(k)


def _doubled_angles(tensors: Tensors) -> Tensors:
    return {**tensors, **{name: torch.cat([tensors[name]] * 2, dim=-1) for name in ("cos", "sin")}}


def _padded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, causal: bool, scale: float
) -> torch.Tensor:
    """Pad the documents to the longest one and mask the padding."""
    bounds = list(pairwise(cu_seqlens.tolist()))
    q, k, v = (
        torch.nn.utils.rnn.pad_sequence([x[start:stop] for start, stop in bounds], batch_first=True).transpose(1, 2)
        for x in (q, k, v)
    )
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
    if causal:
        mask = mask & torch.ones(longest, longest, dtype=torch.bool).tril()
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    return torch.cat([row[: stop - start] for row, (start, stop) in zip(out, bounds, strict=True)])


def _depthwise(x: torch.Tensor, taps: torch.Tensor, order: str = "correlation") -> torch.Tensor:
    """Filter x [B, C, L] causally with taps [C, K] of each channel."""
    return functional.conv1d(functional.pad(x, (taps.shape[1] - 1, 0)), taps[:, None], groups=len(taps))


def _gates(projected: torch.Tensor, projection_taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    filtered = _depthwise(projected, projection_taps)
    post_gate, pre_gate, value = filtered.view(len(filtered), -1, 3, filtered.shape[-1]).unbind(dim=2)
    return post_gate, pre_gate * value


def _hcs(projected: torch.Tensor, projection_taps: torch.Tensor, taps: torch.Tensor, *, order: str) -> torch.Tensor:
    post_gate, x = _gates(projected, projection_taps)
    return post_gate * _depthwise(x, taps.repeat_interleave(x.shape[1] // len(taps), dim=0))


def _hcm(
    projected: torch.Tensor, projection_taps: torch.Tensor, taps: torch.Tensor, skip: torch.Tensor, *, order: str
) -> torch.Tensor:
    post_gate, x = _gates(projected, projection_taps)
    filters = taps.repeat_interleave(x.shape[1] // len(taps), dim=0)
    return post_gate * (_filtered(x, filters) + skip[:, None] * x)


def _hcl(
    projected: torch.Tensor, projection_taps: torch.Tensor, skip: torch.Tensor, filters: torch.Tensor
) -> torch.Tensor:
    post_gate, x = _gates(projected, projection_taps)
    return post_gate * (_filtered(x, filters) + skip[:, None] * x)


def _with_filter(tensors: Tensors) -> Tensors:
    """Put HCL's filter [H, L] in the place of its poles and residues."""
    others = dict(tensors)
    log_poles, residues = others.pop("log_poles"), others.pop("residues")
    return {**others, "filters": long_filters(log_poles, residues, tensors["projected"].shape[-1])}


def _filtered(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    return convolved(x, torch.fft.rfft(filters, 2 * x.shape[-1]))


def _rolled_fir_step(
    x: torch.Tensor, taps: torch.Tensor, skip: torch.Tensor, state: torch.Tensor, *, order: str
) -> torch.Tensor:
    """Step a state [B, C, K-1] whose oldest input moves out at the left."""
    filters = taps.repeat_interleave(x.shape[1] // len(taps), dim=0)
    y = filters[:, 0] * x + (state * filters[:, 1:].flip(-1)).sum(dim=-1)
    state.copy_(torch.roll(state, -1, dims=-1))
    state[..., -1] = x
    return y + skip * x


def _channel_major_state(tensors: Tensors) -> Tensors:
    others = dict(tensors)
    history, end, width = others.pop("history"), int(others.pop("end")), tensors["taps"].shape[1]
    slots = [(end - lag) % history.shape[1] for lag in range(width - 1, 0, -1)]
    return {**others, "state": history[:, slots].mT.contiguous()}


def _modal_step(x: torch.Tensor, log_poles: torch.Tensor, residues: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state.copy_(log_poles.exp() * state + x[..., None])
    return (residues * state).sum(dim=-1)
