from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cistron_kernels.modal_scan import chunks, gated_modal_scan, matrices, modal_scan


def direct(x: torch.Tensor, log_poles: torch.Tensor, residues: torch.Tensor, state: torch.Tensor | None = None):
    """Token by token in the state form; returns the outputs and the state after each token."""
    batch, channels, length = x.shape
    current = x.new_zeros(batch, channels, log_poles.shape[1]) if state is None else state
    outputs, states = [], []
    for t in range(length):
        current = log_poles.exp() * current + x[..., t, None]
        outputs.append((residues * current).sum(-1))
        states.append(current)
    return torch.stack(outputs, dim=-1), torch.stack(states, dim=-1)


def by_fft(x: torch.Tensor, log_poles: torch.Tensor, residues: torch.Tensor) -> torch.Tensor:
    length = x.shape[-1]
    filters = (residues[..., None] * (log_poles[..., None] * torch.arange(length, dtype=x.dtype)).exp()).sum(1)
    spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(filters, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length]


def draw(batch: int, channels: int, length: int, poles: int = 3, dtype: torch.dtype = torch.float64):
    x = torch.randn(batch, channels, length, dtype=dtype)
    log_poles = -torch.rand(channels, poles, dtype=dtype) * 0.3 - 1e-3
    return x, log_poles, torch.randn(channels, poles, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 37])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_equals_the_recurrence(length: int, chunk: int):
    torch.manual_seed(0)
    x, log_poles, residues = draw(2, 3, length)
    initial = torch.randn(2, 3, 3, dtype=torch.float64)
    for state in (None, initial):
        y, final = modal_scan(x, log_poles, residues, state=state, chunk=chunk)
        expected, states = direct(x, log_poles, residues, state)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(final, states[..., -1])


@pytest.mark.parametrize("length", [50, 64, 130])
def test_equals_the_fft_with_gradients(length: int):
    torch.manual_seed(1)
    inputs = [tensor.requires_grad_() for tensor in draw(2, 3, length)]
    upstream = torch.randn(2, 3, length, dtype=torch.float64)
    outputs = [modal_scan(*inputs, chunk=16)[0], by_fft(*inputs)]
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(output, inputs, upstream) for output in outputs]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 9, 100])
def test_the_recurrence_by_pairs_equals_step_by_step(steps: int):
    torch.manual_seed(7)
    updates, log_decay = torch.randn(2, 3, steps, 4).double(), -torch.rand(2, 4).double()
    states = [updates[:, :, 0]]
    for i in range(1, steps):
        states.append(log_decay.exp()[:, None] * states[-1] + updates[:, :, i])
    chunks.accumulate(updates, matrices.level_decays(log_decay, steps))
    torch.testing.assert_close(updates, torch.stack(states, dim=2))


@pytest.mark.parametrize("block_elements", [1, 2 * 2 * 21, 10**6])
def test_blocks_of_channels_equal_the_recurrence_with_gradients(monkeypatch, block_elements: int):
    monkeypatch.setattr(chunks, "_BLOCK_ELEMENTS", block_elements)
    torch.manual_seed(8)
    x, log_poles, residues = draw(2, 5, 21)
    inputs = [x.mT.contiguous().mT, log_poles, residues, torch.randn(2, 5, 3).double()]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    lengths = torch.tensor([13, 21])
    y, final = modal_scan(*inputs[:3], state=inputs[3], lengths=lengths, chunk=4)
    expected, states = direct(*inputs)
    rows = torch.arange(2)
    upstream, upstream_state = torch.randn_like(y), torch.randn_like(final)
    gradients = [
        torch.autograd.grad((outputs * upstream).sum() + (state * upstream_state).sum(), inputs)
        for outputs, state in ((y, final), (expected, states[rows, ..., lengths - 1]))
    ]
    torch.testing.assert_close(y, expected)
    for got, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(got, reference)


def test_gradients_through_both_states():
    torch.manual_seed(2)
    x, log_poles, residues = draw(2, 2, 7, poles=2)
    inputs = [x, log_poles, residues, torch.randn(2, 2, 2, dtype=torch.float64)]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, poles, residues, state: modal_scan(x, poles, residues, state=state, chunk=3), inputs
    )
    lengths = torch.tensor([4, 6])
    assert torch.autograd.gradcheck(
        lambda x, poles, residues, state: modal_scan(x, poles, residues, state=state, lengths=lengths, chunk=3)[1],
        inputs,
    )


@pytest.mark.parametrize("lengths", [None, [1, 9], [0, 5]])
def test_gated_equals_token_by_token_with_gradients(lengths: list[int] | None):
    torch.manual_seed(9)
    x, log_poles, residues = draw(2, 2, 9)
    taps, skip = torch.randn(6, 3).double(), torch.randn(2).double()
    past, state = torch.randn(2, 6, 2).double(), torch.randn(2, 2, 3).double()
    inputs = [x.repeat(1, 3, 1), taps, log_poles, residues, skip, past, state]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    real = None if lengths is None else torch.tensor(lengths)
    got = gated_modal_scan(*inputs[:5], projection_history=past, state=state, lengths=real)
    window = torch.cat([past, inputs[0]], dim=-1)
    filtered = torch.stack([(window[..., t : t + 3] * taps).sum(-1) for t in range(9)], dim=-1)
    post, pre, value = filtered[:, ::3], filtered[:, 1::3], filtered[:, 2::3]
    y, states = direct(pre * value, log_poles, residues, state)
    ends = [9, 9] if lengths is None else lengths
    expected = (
        post * (y + skip[:, None] * pre * value),
        torch.stack([window[row, :, end : end + 2] for row, end in enumerate(ends)]),
        torch.stack([torch.cat([state[..., None], states], dim=-1)[row, ..., end] for row, end in enumerate(ends)]),
    )
    upstream = [torch.randn_like(out) for out in expected]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


def test_each_rows_state_is_that_after_its_own_last_token():
    torch.manual_seed(3)
    x, log_poles, residues = draw(7, 2, 19)
    initial = torch.randn(7, 2, 3, dtype=torch.float64)
    lengths = torch.tensor([0, 1, 7, 8, 9, 16, 19])
    _, states = direct(x, log_poles, residues, initial)
    _, final = modal_scan(x, log_poles, residues, state=initial, lengths=lengths, chunk=8)
    assert torch.equal(final[0], initial[0])
    for row, length in enumerate(lengths.tolist()):
        if length:
            torch.testing.assert_close(final[row], states[row, ..., length - 1])


@pytest.mark.parametrize("sizes", [(1,) * 30, (7, 23), (29, 1)])
def test_chunks_equal_the_whole(sizes: tuple[int, ...]):
    torch.manual_seed(4)
    x, log_poles, residues = draw(2, 3, 30)
    whole, final = modal_scan(x, log_poles, residues, chunk=8)
    state, pieces = None, []
    for piece in x.split(list(sizes), dim=-1):
        y, state = modal_scan(piece, log_poles, residues, state=state, chunk=8)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole)
    torch.testing.assert_close(state, final)


def test_fp32_keeps_its_digits_over_a_long_sequence():
    torch.manual_seed(5)
    log_poles = -torch.linspace(-11.5, 0, 16, dtype=torch.float64).exp()[None]
    residues, x = torch.randn(1, 16, dtype=torch.float64) / 16, torch.randn(1, 1, 8192, dtype=torch.float64)
    log_poles, residues, x = (tensor.float().double() for tensor in (log_poles, residues, x))
    exact, _ = modal_scan(x, log_poles, residues)
    got, state = modal_scan(x.float(), log_poles.float(), residues.float())
    assert state.dtype == torch.float32
    error = (got - exact).norm() / exact.norm()
    assert (
        error < 1e-6
    )  # one rounded decay, repeated chunk after chunk, is off by 3e-6; powers of a rounded pole by 7e-5


def test_half_precision_keeps_an_fp32_state_even_under_autocast():
    torch.manual_seed(6)
    x, log_poles, residues = draw(1, 4, 100, dtype=torch.float32)
    x = x.bfloat16()
    exact, final = modal_scan(x.float(), log_poles, residues)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = modal_scan(x, log_poles, residues)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16())
    assert torch.equal(state, final)


def test_no_tensor_grows_with_length_times_poles():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [tensor.nbytes for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
            largest = max([largest, *sizes])
            return out

    x, log_poles, residues = draw(1, 4, 4096, poles=16, dtype=torch.float32)
    with Watch():
        modal_scan(x, log_poles, residues)
    assert largest <= x.nbytes + 64  # the output, aligned


def test_only_the_input_is_kept_for_the_gradient():
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = [tensor.requires_grad_() for tensor in draw(1, 4, 8192, poles=16, dtype=torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        modal_scan(*inputs)
    size = 4 * inputs[0].numel()
    assert size <= sum(kept.values()) < 1.5 * size


def test_autocast_around_the_backward_pass_changes_nothing():
    tensors = [tensor.float().requires_grad_() for tensor in draw(1, 3, 50)]
    y = modal_scan(*tensors)[0].square().sum()
    want = torch.autograd.grad(y, tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # By the compiler itself.
def test_compiles_into_one_graph():
    x, log_poles, residues = draw(2, 3, 50)

    def scanned(x: torch.Tensor) -> torch.Tensor:
        return modal_scan(x, log_poles, residues)[0]

    compiled = torch.compile(scanned, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    got, want = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, scanned))
    torch.testing.assert_close(got, want)


def without_keeping(x: torch.Tensor, log_poles: torch.Tensor, residues: torch.Tensor) -> torch.Tensor:
    """Scan as if for a gradient, which makes the matrices anew."""
    return modal_scan(x, log_poles.detach().clone().requires_grad_(), residues)[0].detach()


def test_kept_matrices_are_those_of_the_numbers_of_the_moment():
    x, log_poles, residues = draw(2, 3, 70)
    first = modal_scan(x, log_poles, residues)[0]
    made = matrices.kept_matrices(log_poles, residues, size=32, chunks=3)
    assert made is not None
    modal_scan(x[..., :40], log_poles, residues)
    assert matrices.kept_matrices(log_poles, residues, size=32, chunks=3) is made
    torch.testing.assert_close(first, without_keeping(x, log_poles, residues), rtol=0, atol=0)
    for tensor in (log_poles, residues):
        tensor.data[1, 2] *= 2  # Past autograd: the tensor's version does not change.
        got = modal_scan(x, log_poles, residues)[0]
        assert not torch.equal(got, first)
        torch.testing.assert_close(got, without_keeping(x, log_poles, residues), rtol=0, atol=0)
        first = got


@pytest.mark.parametrize("lengths", [(5, 70, 300, 33, 1, 32), (300, 5, 70)])
def test_kept_matrices_serve_every_length(lengths: tuple[int, ...]):
    _, log_poles, residues = draw(1, 3, 1)
    for length in lengths:
        x = torch.randn(2, 3, length, dtype=torch.float64)
        got = modal_scan(x, log_poles, residues)[0]
        torch.testing.assert_close(got, without_keeping(x, log_poles, residues), rtol=0, atol=0)


def test_a_prompt_shorter_than_a_chunk_does_not_replace_what_is_kept():
    x, log_poles, residues = draw(2, 3, 70)
    modal_scan(x, log_poles, residues)
    made = matrices.kept_matrices(log_poles, residues, size=32, chunks=3)
    modal_scan(x[..., :5], log_poles, residues)
    assert matrices.kept_matrices(log_poles, residues, size=32, chunks=3) is made is not None


def test_a_layer_that_changed_its_dtype_gets_other_matrices():
    x, log_poles, residues = draw(1, 3, 40)
    modal_scan(x, log_poles, residues)
    log_poles.data, residues = log_poles.float(), residues.float()
    got, state = modal_scan(x.float(), log_poles, residues)
    assert got.dtype == state.dtype == torch.float32
    torch.testing.assert_close(got, without_keeping(x.float(), log_poles, residues), rtol=0, atol=0)


def test_matrices_kept_in_inference_mode_serve_outside_of_it():
    x, log_poles, residues = draw(1, 3, 40)
    with torch.inference_mode():
        want = modal_scan(x, log_poles, residues)[0]
    made = matrices.kept_matrices(log_poles, residues, size=32, chunks=2)
    torch.testing.assert_close(modal_scan(x, log_poles, residues)[0], want, rtol=0, atol=0)
    assert matrices.kept_matrices(log_poles, residues, size=32, chunks=2) is made is not None
    modal_scan(x.requires_grad_(), log_poles, residues)[0].sum().backward()
    assert x.grad is not None


def test_what_is_only_traced_is_not_kept():
    x, log_poles, residues = draw(1, 3, 40)
    want = modal_scan(x, log_poles.clone(), residues)[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert modal_scan(mode.from_tensor(x), log_poles, residues)[0].shape == x.shape
    with pytest.raises(RuntimeError, match="atching rule"):
        torch.vmap(lambda residues: modal_scan(x, log_poles, residues)[0])(residues.expand(2, -1, -1))
    torch.testing.assert_close(modal_scan(x, log_poles, residues)[0], want, rtol=0, atol=0)


def test_matrices_go_with_the_layer():
    x, log_poles, residues = draw(1, 3, 40)
    modal_scan(x, log_poles, residues)
    made = matrices.kept_matrices(log_poles, residues, size=32, chunks=2)
    assert made is not None
    left = weakref.ref(made.toeplitz)
    del log_poles, made
    gc.collect()
    assert left() is None
