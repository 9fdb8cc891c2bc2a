from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kernels.harness import compare

from cistron_kernels.decode_step import fir_step, gated_fir_step, gated_modal_step, modal_step
from cistron_kernels.dispatch import override
from cistron_kernels.hyena_fir import TapOrder, hyena_fir

WIDTH = 3
"""Of the projection's filter."""
ROWS_OF_ENDS = [5, torch.tensor([7]), torch.tensor([2, 140, -3])]
"""Slots: of all rows in host memory, of all rows in a tensor, of each row; all modulo the size of the ring."""


@torch.no_grad()
def with_states(step: Callable[..., torch.Tensor], *states: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the step as a function of its states, whose next values are outputs."""

    @torch.no_grad()
    def function(**arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mine = {name: copied(arguments[name]) for name in states}
        return (step(**{**arguments, **mine}), *mine.values())

    return function


def copied(state: torch.Tensor) -> torch.Tensor:
    """Return a copy with the gaps of the original, in memory that the harness guards."""
    return torch.empty_strided(state.shape, state.stride(), dtype=state.dtype).copy_(state)


def fir_inputs(batch: int, channels: int, groups: int, width: int, *, slots: int | None = None, skips: int = 0):
    torch.manual_seed(channels + width)
    return {
        "taps": torch.randn(groups, width),
        "history": torch.randn(batch, slots or width, channels),
        "skip": torch.randn(skips) if skips else None,
    }


def gate_inputs(batch: int, channels: int, *, slots: int = WIDTH) -> dict[str, torch.Tensor]:
    return {
        "projected": torch.randn(batch, 3 * channels),
        "projection_taps": torch.randn(3 * channels, WIDTH),
        "projection_history": torch.randn(batch, slots, 3 * channels),
    }


def modal_inputs(batch: int, channels: int, poles: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(channels + poles)
    return {
        "log_poles": -torch.rand(channels, poles).mul(12).sub(11).exp(),
        "residues": torch.randn(channels, poles),
        "state": torch.randn(batch, channels, poles),
    }


@pytest.mark.parametrize("end", ROWS_OF_ENDS)
@pytest.mark.parametrize(
    ("order", "channels", "groups", "width", "skips"),
    [("correlation", 6, 6, 3, 0), ("correlation", 30, 2, 7, 2), ("impulse", 75, 5, 128, 75), ("impulse", 4, 1, 1, 1)],
)
def test_finite_filters(order: TapOrder, channels: int, groups: int, width: int, skips: int, end: int | torch.Tensor):
    inputs = fir_inputs(3, channels, groups, width, slots=width + 2, skips=skips)
    compare(with_states(fir_step, "history"), {"x": torch.randn(3, channels), **inputs}, end=end, order=order)
    if groups < channels:
        step = with_states(gated_fir_step, "history", "projection_history")
        compare(step, {**gate_inputs(3, channels), **inputs}, projection_end=end, end=end, order=order)


def test_a_slot_behind_the_ring_is_noticed(monkeypatch: pytest.MonkeyPatch):
    from cistron_kernels.decode_step.kernel import Ring

    real = Ring.numbers
    monkeypatch.setattr(Ring, "numbers", lambda ring: (ring.history.shape[1] + 1, *real(ring)[1:]))
    inputs = {"x": torch.randn(1, 6), **fir_inputs(1, 6, 2, 4)}
    with pytest.raises(AssertionError, match="wrote outside"):
        compare(with_states(fir_step, "history"), inputs, end=4, order="impulse")


@pytest.mark.parametrize("end", ROWS_OF_ENDS)
@pytest.mark.parametrize(("channels", "poles"), [(1, 1), (5, 3), (70, 16)])
def test_modal_filters(channels: int, poles: int, end: int | torch.Tensor):
    inputs = modal_inputs(3, channels, poles)
    compare(with_states(modal_step, "state"), {"x": torch.randn(3, channels), **inputs})
    tensors = {**gate_inputs(3, channels, slots=5), **inputs, "skip": torch.randn(channels)}
    compare(with_states(gated_modal_step, "state", "projection_history"), tensors, projection_end=end)


@pytest.mark.parametrize("batch", [1, 29])
def test_many_rows_share_a_program_and_do_not_mix(batch: int):
    ends = torch.arange(batch) * 3
    inputs = {**gate_inputs(batch, 8), **fir_inputs(batch, 8, 2, 7)}
    step = with_states(gated_fir_step, "history", "projection_history")
    compare(step, inputs, projection_end=ends, end=ends, order="correlation")
    inputs = {**gate_inputs(batch, 8), **modal_inputs(batch, 8, 4), "skip": torch.randn(8)}
    compare(with_states(gated_modal_step, "state", "projection_history"), inputs, projection_end=ends)


def test_strided_tokens_and_histories():
    x, history = torch.randn(2, 3, 6)[:, 1], torch.randn(2, 9, 8)[:, 2:7, 1:7]
    step = with_states(fir_step, "history")
    for token in (x, x.T.contiguous().T):
        compare(step, {"x": token, "taps": torch.randn(2, 4), "history": history}, end=4, order="impulse")
    state = torch.randn(2, 5, 6, 3)[:, 2]
    compare(with_states(modal_step, "state"), {"x": x, **modal_inputs(2, 6, 3), "state": state})


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_steps_around_a_ring_equal_the_filter(backend: str):
    """Rows that started at different times, in rings of no more slots than taps."""
    torch.manual_seed(3)
    x, taps, starts = torch.randn(2, 6, 11), torch.randn(2, 4), torch.tensor([0, 2])
    history, end = torch.zeros(2, 4, 6), starts.clone()
    expected, _ = hyena_fir(x, taps, order="correlation")
    with override(backend), torch.no_grad():
        for t in range(11):
            y = fir_step(x[..., t], taps, history, end, order="correlation")
            torch.testing.assert_close(y, expected[..., t])
            end += 1


def test_slow_poles_stay_exact_over_many_steps():
    torch.manual_seed(2)
    x, residues = torch.randn(1, 2, 60), torch.randn(2, 16) / 16
    log_poles = -torch.rand(2, 16).mul(8).sub(10).exp()
    wide, state = torch.ones(1, 2, 16, dtype=torch.float64), torch.ones(1, 2, 16)
    with override("triton"), torch.no_grad():
        for t in range(x.shape[-1]):
            wide = log_poles.double().exp() * wide + x[..., t, None]
            modal_step(x[..., t], log_poles, residues, state)
    assert (state - wide).abs().max() < 1e-6 * wide.abs().max()


def test_half_precision_histories_with_states_in_fp32():
    """The interpreter truncates where a GPU rounds to the nearest."""
    tensors = {**gate_inputs(2, 8), **fir_inputs(2, 8, 2, 7), **modal_inputs(2, 8, 4), "skip": torch.randn(8)}
    half = {name: value.bfloat16() for name, value in tensors.items() if name not in ("log_poles", "residues", "state")}
    fir = {**gate_inputs(0, 0), **{name: half[name] for name in (*gate_inputs(0, 0), "taps", "history")}}
    modal = {name: {**tensors, **half}[name] for name in (*gate_inputs(0, 0), "log_poles", "residues", "state", "skip")}
    results = {}
    for backend in ("torch", "triton"):
        with override(backend):
            y, *_ = with_states(gated_fir_step, "history", "projection_history")(
                **fir, projection_end=2, end=6, order="correlation"
            )
            z, state, _ = with_states(gated_modal_step, "state", "projection_history")(**modal, projection_end=2)
            results[backend] = (y, z, state)
    for got, want in zip(results["triton"], results["torch"], strict=True):
        assert got.dtype == want.dtype
        assert (got.double() - want.double()).norm() < 0.03 * want.double().norm()


def test_a_gradient_is_an_error():
    inputs = fir_inputs(2, 6, 2, 3)
    with override("triton"):
        y = fir_step(torch.randn(2, 6), inputs["taps"].requires_grad_(), inputs["history"], 0, order="impulse")
        with pytest.raises(RuntimeError, match="autograd"):
            y.sum().backward()


X, TAPS, HISTORY = torch.zeros(2, 6), torch.zeros(2, 3), torch.zeros(2, 4, 6)
POLES, STATE = torch.zeros(6, 4), torch.zeros(2, 6, 4)
GATES = (torch.zeros(2, 18), torch.zeros(18, 3))
RING = torch.zeros(2, 4, 18)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: fir_step(X[0], TAPS, HISTORY, 2, order="impulse"), r"a token is \[B, C\]"),
        (lambda: fir_step(X, TAPS, HISTORY[:1], 2, order="impulse"), "the rows of the token"),
        (lambda: fir_step(X, TAPS, HISTORY[:, :2], 2, order="impulse"), "as many slots as there are taps"),
        (lambda: fir_step(X, torch.zeros(4, 3), HISTORY, 2, order="impulse"), "divides the 6 channels"),
        (lambda: fir_step(X, TAPS, HISTORY[..., :4], 2, order="impulse"), "divides the 6 channels"),
        (lambda: fir_step(X, TAPS, HISTORY.mT.contiguous().mT, 2, order="impulse"), "must be contiguous"),
        (lambda: fir_step(X, TAPS, HISTORY, -1, order="impulse"), "must not be negative"),
        (lambda: fir_step(X, TAPS, HISTORY, 1.5, order="impulse"), "must be an int"),
        (lambda: fir_step(X, TAPS, HISTORY, 2, order="impuls"), "must be one of correlation, impulse, not 'impuls'"),
        (lambda: fir_step(X, TAPS, HISTORY, torch.zeros(2).bool(), order="impulse"), "integer tensor"),
        (lambda: fir_step(X, TAPS, HISTORY, torch.zeros(2), order="impulse"), "integer tensor"),
        (lambda: fir_step(X, TAPS, HISTORY, torch.zeros(3).long(), order="impulse"), "integer tensor"),
        (lambda: fir_step(X, TAPS, HISTORY, torch.zeros(2, device="meta").long(), order="impulse"), "on the device"),
        (lambda: fir_step(X.long(), TAPS, HISTORY, 2, order="impulse"), "floating-point"),
        (lambda: fir_step(X, TAPS, HISTORY, 2, order="impulse", skip=torch.zeros(3)), "skip must be"),
        (lambda: modal_step(X, POLES, POLES[:, :2], STATE), "log_poles and residues must be"),
        (lambda: modal_step(torch.tensor(1.0), POLES, POLES, STATE), "log_poles and residues must be"),
        (lambda: modal_step(X, POLES, POLES, STATE[:1]), "state must be"),
        (lambda: modal_step(X, POLES, POLES, STATE.mT.contiguous().mT), "must be contiguous"),
        (lambda: gated_modal_step(GATES[0][:, :16], GATES[1], POLES, POLES, POLES[:, 0], RING, STATE, 2), "3D"),
        (lambda: gated_modal_step(*GATES, POLES, POLES, POLES[0], RING, STATE, 2), "skip"),
        (lambda: gated_modal_step(*GATES, POLES, POLES, POLES[:, 0].long(), RING, STATE, 2), "floating-point"),
        (lambda: gated_fir_step(*GATES, TAPS, RING, HISTORY, 2, 2, order="causal"), "must be one of"),
        (lambda: gated_fir_step(GATES[0], GATES[1][:6], TAPS, RING, HISTORY, 2, 2, order="impulse"), "its taps"),
        (lambda: gated_fir_step(*GATES, TAPS, RING, HISTORY[..., :4], 2, 2, order="impulse"), "divides the 6"),
        (lambda: gated_fir_step(*GATES, TAPS, RING[..., :6], HISTORY, 2, 2, order="impulse"), "its history"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(call: Callable[[], object], problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        call()
    assert "got x [" in str(caught.value) or "got projected [" in str(caught.value)


def test_operators_are_registered_in_full():
    from cistron_kernels.decode_step import kernel

    gates, fir, modal = gate_inputs(2, 6), fir_inputs(2, 6, 2, 4, skips=2), modal_inputs(2, 6, 3)
    projected, projection_taps, projection_history = gates.values()
    end, skip = torch.tensor([3]), fir["skip"]
    fir_arguments = (fir["taps"], fir["history"], end, 0, True, skip)
    gated_arguments = (projected, projection_taps, fir["taps"], projection_history, fir["history"])
    filters = modal["log_poles"], modal["residues"]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for op, arguments in (
        (kernel.fir_step, (projected[:, :6], *fir_arguments)),
        (kernel.gated_fir_step, (*gated_arguments, end, 0, None, 5, False, None)),
        (kernel.modal_step, (projected[:, :6], *modal.values())),
        (
            kernel.gated_modal_step,
            (projected, projection_taps, *filters, torch.randn(6), projection_history, modal["state"], None, 1),
        ),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)


def test_compiles_whole():
    gates, fir, modal = gate_inputs(2, 6), fir_inputs(2, 6, 2, 4), modal_inputs(2, 6, 3)
    end, skip = torch.tensor([3]), torch.randn(6)

    def layers(history: torch.Tensor, ring: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        arguments = gates["projected"], gates["projection_taps"]
        y = gated_fir_step(*arguments, fir["taps"], ring, history, end, end, order="impulse")
        z = gated_modal_step(*arguments, modal["log_poles"], modal["residues"], skip, ring, state, end + 1)
        return y + z

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        states = [tensor.clone() for tensor in (fir["history"], gates["projection_history"], modal["state"])]
        return [function(*states), *states]

    with override("triton"), torch.no_grad():
        expected = run(layers)
        got = run(torch.compile(layers, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
