from __future__ import annotations

import pytest
import torch

from cistron_kernels.hyena_fir import TapOrder, hyena_fir

ORDERS: tuple[TapOrder, TapOrder] = ("correlation", "impulse")


def naive(
    x: torch.Tensor,
    taps: torch.Tensor,
    order: TapOrder,
    skip: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, channels, length = x.shape
    groups, width = taps.shape
    y = torch.zeros_like(x)
    for b in range(batch):
        for c in range(channels):
            group = c // (channels // groups)
            for t in range(length):
                for lag in range(width):
                    tap = taps[group, lag if order == "impulse" else width - 1 - lag]
                    if t >= lag:
                        y[b, c, t] += tap * x[b, c, t - lag]
                    elif past is not None:
                        y[b, c, t] += tap * past[b, c, width - 1 + t - lag]
                if skip is not None:
                    y[b, c, t] += skip[c // (channels // len(skip))] * x[b, c, t]
    return y


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("groups", "width", "length"), [(4, 3, 9), (2, 7, 5), (2, 7, 1), (1, 4, 40), (4, 1, 3)])
def test_equals_loops(order: TapOrder, groups: int, width: int, length: int):
    torch.manual_seed(0)
    x, taps, skip, past = draw(2, 4, length), draw(groups, width), draw(4), draw(2, 4, width - 1)
    y, _ = hyena_fir(x, taps, order=order)
    torch.testing.assert_close(y, naive(x, taps, order))
    y, _ = hyena_fir(x, taps, order=order, skip=skip, history=past)
    torch.testing.assert_close(y, naive(x, taps, order, skip, past))
    y, _ = hyena_fir(x, taps, order=order, skip=skip[:groups])
    torch.testing.assert_close(y, naive(x, taps, order, skip[:groups]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("groups", "width", "length"), [(4, 3, 6), (2, 5, 3), (1, 9, 35)])
def test_gradients_of_everything(order: TapOrder, groups: int, width: int, length: int):
    torch.manual_seed(1)
    inputs = [draw(2, 4, length), draw(groups, width), draw(4), draw(2, 4, width - 1)]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, taps, skip, past: hyena_fir(x, taps, order=order, skip=skip, history=past), inputs
    )


@pytest.mark.parametrize("length", [31, 127, 300])
def test_gradients_of_a_medium_filter_equal_those_of_conv1d(length: int):
    torch.manual_seed(2)
    x, taps, upstream = draw(2, 6, length).requires_grad_(), draw(3, 128).requires_grad_(), draw(2, 6, length)
    hyena_fir(x, taps, order="impulse")[0].backward(upstream)
    got = x.grad, taps.grad
    x.grad = taps.grad = None
    padded = torch.nn.functional.pad(x, (127, 0))
    kernel = taps.repeat_interleave(2, dim=0).flip(-1)[:, None]
    torch.nn.functional.conv1d(padded, kernel, groups=6).backward(upstream)
    torch.testing.assert_close(got[0], x.grad)
    torch.testing.assert_close(got[1], taps.grad)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 8), (5, 6), (10, 1)])
def test_chunks_equal_the_whole(sizes: tuple[int, ...]):
    torch.manual_seed(3)
    x, taps = draw(2, 4, 11), draw(2, 7)
    whole, last = hyena_fir(x, taps, order="correlation")
    history, pieces = None, []
    for piece in x.split(list(sizes), dim=-1):
        y, history = hyena_fir(piece, taps, order="correlation", history=history)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole)
    assert history is not None
    assert torch.equal(history, last)
    assert torch.equal(last, x[..., -6:])


def test_the_history_ends_at_each_rows_own_last_token():
    torch.manual_seed(4)
    x, taps, past = draw(4, 2, 5), draw(2, 4), draw(4, 2, 3)
    _, history = hyena_fir(x, taps, order="impulse", history=past, lengths=torch.tensor([0, 1, 3, 5]))
    assert torch.equal(history[0], past[0])
    assert torch.equal(history[1], torch.cat([past[1, :, 1:], x[1, :, :1]], dim=-1))
    assert torch.equal(history[2], x[2, :, :3])
    assert torch.equal(history[3], x[3, :, 2:])


def test_half_precision_is_computed_in_fp32_and_rounded_once():
    torch.manual_seed(5)
    x, taps, skip = draw(1, 4, 200).bfloat16(), draw(2, 128).bfloat16(), draw(4).bfloat16()
    exact, _ = hyena_fir(x.double(), taps.double(), order="impulse", skip=skip.double())
    got, history = hyena_fir(x, taps, order="impulse", skip=skip)
    assert got.dtype == history.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = hyena_fir(x.float(), taps.float(), order="impulse", skip=skip.float())
    torch.testing.assert_close(inside.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_same_input_gives_the_same_bits():
    torch.manual_seed(6)
    x, taps = torch.randn(2, 8, 150, requires_grad=True), torch.randn(2, 128, requires_grad=True)
    results = []
    for _ in range(2):
        x.grad = taps.grad = None
        y, _ = hyena_fir(x, taps, order="impulse")
        y.square().sum().backward()
        results.append((y.detach(), x.grad, taps.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("width", [3, 5, 33, 128])
@pytest.mark.parametrize("length", [1, 31, 32, 70])
def test_the_gradient_of_the_taps_equals_that_of_the_plain_convolution(width: int, length: int):
    torch.manual_seed(width + length)
    x, taps, upstream = draw(2, 6, length).requires_grad_(), draw(3, width).requires_grad_(), draw(2, 6, length)
    window = torch.nn.functional.pad(x, (width - 1, 0))
    plain = torch.nn.functional.conv1d(window, taps.repeat_interleave(2, dim=0)[:, None], groups=6)
    want = torch.autograd.grad(plain, (x, taps), upstream)
    got = torch.autograd.grad(hyena_fir(x, taps, order="correlation")[0], (x, taps), upstream)
    torch.testing.assert_close(got, want)


def test_autocast_around_the_backward_pass_changes_nothing():
    torch.manual_seed(7)
    x, taps = torch.randn(1, 4, 90, requires_grad=True), torch.randn(2, 16, requires_grad=True)
    y = hyena_fir(x, taps, order="impulse")[0].square().sum()
    want = torch.autograd.grad(y, (x, taps), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, (x, taps))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # By the compiler itself.
def test_compiles_into_one_graph():
    x, taps = torch.randn(2, 4, 40, requires_grad=True), torch.randn(2, 7, requires_grad=True)

    def filtered(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        return hyena_fir(x, taps, order="correlation")[0]

    compiled = torch.compile(filtered, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x, taps).square().sum(), (x, taps)) for f in (compiled, filtered))
    torch.testing.assert_close(got, want)
