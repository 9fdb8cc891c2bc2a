"""Triton functions of attention over packed documents: online softmax forward, recomputed scores backward.

A tile is a block of one document's tokens; the map lists its first token, and the document's begin and end. Scores are
in units of log 2, so that softmax runs on exp2.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(map_ptr):
    """Return first token of this program's tile, and begin and end of its document."""
    entry = map_ptr + 3 * tl.program_id(0)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def _rows(ptr, token, stride, end, HEAD: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
    """Load the rows of some tokens [N, WIDTH], zeros behind the document's end and the head's last channel."""
    column = tl.arange(0, WIDTH)
    inside = (token < end)[:, None] & (column < HEAD)[None, :]
    at = token.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(ptr + at, mask=inside, other=0.0).to(OPERAND)


@triton.jit
def _store_rows(ptr, rows, token, stride, end, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Store the rows of some tokens [N, WIDTH] that `_rows` would load."""
    column = tl.arange(0, WIDTH)
    inside = (token < end)[:, None] & (column < HEAD)[None, :]
    at = token.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(ptr + at, rows.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _visible(query, key, end, CAUSAL: tl.constexpr):
    """Return which keys the queries see; the two broadcast."""
    if CAUSAL:
        return (key <= query) & (key < end)
    return (key < end) & (query < end)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, map_ptr, tokens, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token,
    CAUSAL: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Attend with QUERIES queries of one head; write outputs and the logarithms of the softmax's sums."""
    first, begin, end = _tile(map_ptr)
    head = tl.program_id(1).to(tl.int64)
    query = first + tl.arange(0, QUERIES)
    q = _rows(q_ptr + head * q_head, query, q_token, end, HEAD, WIDTH, OPERAND)
    largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    out = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    last = tl.minimum(end, first + QUERIES) if CAUSAL else end
    for start in range(begin, last, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _rows(k_ptr + head * k_head, key, k_token, end, HEAD, WIDTH, OPERAND)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(_visible(query[:, None], key[None, :], end, CAUSAL), scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # Rows behind the document's end see nothing.
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        v = _rows(v_ptr + head * v_head, key, v_token, end, HEAD, WIDTH, OPERAND)
        out = tl.dot(weights.to(OPERAND), v, acc=out * shrink[:, None], input_precision=PRECISION)
        largest = larger
    total = tl.where(query < end, total, 1.0)
    _store_rows(out_ptr + head * HEAD, out / total[:, None], query, out_token, end, HEAD, WIDTH)
    tl.store(lse_ptr + head * tokens + query, largest + tl.log2(total), mask=query < end)


@triton.jit
def delta_kernel(
    out_ptr, grad_out_ptr, delta_ptr, tokens, grad_token, grad_head, out_token,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the product of each output with its gradient, which all scores of a query share."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    out = _rows(out_ptr + head * HEAD, token, out_token, tokens, HEAD, WIDTH, tl.float32)
    grad = _rows(grad_out_ptr + head * grad_head, token, grad_token, tokens, HEAD, WIDTH, tl.float32)
    tl.store(delta_ptr + head * tokens + token, tl.sum(out * grad, axis=1), mask=token < tokens)


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, map_ptr, tokens, scale, grad_scale,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, out_token,
    CAUSAL: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of QUERIES queries of one head, from all keys that they see."""
    first, begin, end = _tile(map_ptr)
    head = tl.program_id(1).to(tl.int64)
    query = first + tl.arange(0, QUERIES)
    q = _rows(q_ptr + head * q_head, query, q_token, end, HEAD, WIDTH, OPERAND)
    grad_out = _rows(grad_out_ptr + head * grad_head, query, grad_token, end, HEAD, WIDTH, OPERAND)
    lse = tl.load(lse_ptr + head * tokens + query, mask=query < end, other=0.0)
    delta = tl.load(delta_ptr + head * tokens + query, mask=query < end, other=0.0)
    grad_q = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    last = tl.minimum(end, first + QUERIES) if CAUSAL else end
    for start in range(begin, last, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _rows(k_ptr + head * k_head, key, k_token, end, HEAD, WIDTH, OPERAND)
        v = _rows(v_ptr + head * v_head, key, v_token, end, HEAD, WIDTH, OPERAND)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        visible = _visible(query[:, None], key[None, :], end, CAUSAL)
        weights = tl.exp2(tl.where(visible, scores - lse[:, None], float("-inf")))
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_q = tl.dot(grad_scores.to(OPERAND), k, acc=grad_q, input_precision=PRECISION)
    _store_rows(grad_q_ptr + head * HEAD, grad_q * grad_scale, query, out_token, end, HEAD, WIDTH)


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, map_ptr, tokens, scale, grad_scale,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, out_token,
    CAUSAL: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of KEYS keys and values of one head, from all queries that see them."""
    first, begin, end = _tile(map_ptr)
    head = tl.program_id(1).to(tl.int64)
    key = first + tl.arange(0, KEYS)
    k = _rows(k_ptr + head * k_head, key, k_token, end, HEAD, WIDTH, OPERAND)
    v = _rows(v_ptr + head * v_head, key, v_token, end, HEAD, WIDTH, OPERAND)
    grad_k = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    grad_v = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    for start in range(first if CAUSAL else begin, end, QUERIES):
        query = start + tl.arange(0, QUERIES)
        q = _rows(q_ptr + head * q_head, query, q_token, end, HEAD, WIDTH, OPERAND)
        grad_out = _rows(grad_out_ptr + head * grad_head, query, grad_token, end, HEAD, WIDTH, OPERAND)
        lse = tl.load(lse_ptr + head * tokens + query, mask=query < end, other=float("inf"))
        delta = tl.load(delta_ptr + head * tokens + query, mask=query < end, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        visible = _visible(query[None, :], key[:, None], end, CAUSAL)
        weights = tl.exp2(tl.where(visible, scores - lse[None, :], float("-inf")))
        grad_v = tl.dot(weights.to(OPERAND), grad_out, acc=grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k = tl.dot(grad_scores.to(OPERAND), q, acc=grad_k, input_precision=PRECISION)
    _store_rows(grad_k_ptr + head * HEAD, grad_k * grad_scale, key, out_token, end, HEAD, WIDTH)
    _store_rows(grad_v_ptr + head * HEAD, grad_v, key, out_token, end, HEAD, WIDTH)
