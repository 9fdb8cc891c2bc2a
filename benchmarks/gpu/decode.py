"""The section of decoding: tokens per second of a whole Evo 2 that continues prompts of mixed lengths.

A step is what generation runs per token, with the largest logit as the choice, so that nothing waits for the host. The
limit is the time to read the weights and to read and write the states once. A step captured as a CUDA graph is timed
only if its replays give what steps give: they cannot where positions are kept in host memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.gpu.budget import Share
from benchmarks.gpu.cases import run_by
from benchmarks.gpu.cases.case import BF16_BYTES, relative_error
from benchmarks.gpu.context import Context
from benchmarks.gpu.random_models import random_evo2
from benchmarks.gpu.report import Row
from cistron.inference.prefill import Prompt, prefill
from cistron.models.evo2.cache import Cache
from cistron.models.evo2.config import ATTENTION, HCL, HCM
from cistron.models.evo2.model import Evo2
from cistron_kernels.dispatch import override

SAME = 5e-2
"""Largest difference between a step's logits and those of the whole prompt read at once, in bf16."""
SAME_REPLAY = 1e-2
PREFILL_CHUNK = 8_192
WARM_UP = 3
_FP32_BYTES = 4


@torch.inference_mode()
def run(context: Context, share: Share) -> Iterator[Row]:
    """Yield the rows of each batch of prompts: reading, steps, and replayed steps."""
    plan = context.plan
    if problem := context.withheld(*run_by("evo2", "decoding")):
        yield Row("decode", plan.decode_model, problem=problem)
        return
    model = random_evo2(
        plan.decode_model, device=plan.device, dtype=torch.bfloat16, **plan.changes.get(plan.decode_model, {})
    ).eval()
    graphs = []
    with override("triton"):
        for name, lengths in plan.prompts.items():
            if share.spent:
                yield Row("decode", name, problem=share.reason())
                continue
            ready = yield from _read(context, model, name, lengths)
            if ready is None:
                continue
            cache, token = ready
            yield _row(context, model, f"steps, {name}", lengths, partial(_steps, model, cache, token, plan.steps))
            graphs.append((name, lengths, cache, token))
        # Last, because a capture that fails may leave the GPU unusable.
        for name, lengths, cache, token in graphs:
            yield _replayed(context, model, name, lengths, cache, token)


def _read(
    context: Context, model: Evo2, name: str, lengths: Sequence[int]
) -> Generator[Row, None, tuple[Cache, torch.Tensor] | None]:
    """Yield the row of reading the prompts; return their cache and next tokens, or none where steps are wrong."""
    prompts = [_prompt(length, seed) for seed, length in enumerate(lengths)]
    _prefill(context, model, prompts)
    start = time.perf_counter()
    cache, logits = _prefill(context, model, prompts)
    context.clock.wait()
    speed = sum(lengths) / (time.perf_counter() - start)
    yield Row("decode", f"reading, {name}", f"{sum(lengths):,} tokens", shown=f"{speed:,.0f} tokens/s",
              figures={"tokens_per_s": speed})  # fmt: skip
    token = logits.argmax(dim=-1, keepdim=True)
    longer = [np.append(prompt, int(chosen)) for prompt, chosen in zip(prompts, token[:, 0], strict=True)]
    whole = _prefill(context, model, longer)[1]
    error = relative_error(model(token, cache=_copy(cache)).logits[:, -1].float(), whole)
    if error <= SAME:
        return cache, token
    yield Row("decode", name, problem=f"not timed: a step's logits differ from the whole prompt's by {error:.1e}")
    return None


def _row(context: Context, model: Evo2, what: str, lengths: Sequence[int], steps: Callable[[], object]) -> Row:
    """Return the row of `context.plan.steps` steps."""
    start = time.perf_counter()
    steps()
    context.clock.wait()
    per_step = (time.perf_counter() - start) / context.plan.steps
    speed = len(lengths) / per_step
    limit = _bytes(model, lengths) / context.ceilings.copy_bytes
    return Row(
        "decode",
        what,
        f"{len(lengths)} x 1 token",
        shown=f"{speed:,.0f} tokens/s, {1e3 * per_step:.2f} ms",
        share=f"{limit / per_step:.2f}",
        figures={"tokens_per_s": speed, "seconds_per_step": per_step, "limit_s": limit},
    )


def _replayed(
    context: Context, model: Evo2, name: str, lengths: Sequence[int], cache: Cache, token: torch.Tensor
) -> Row:
    what = f"replayed steps, {name}"
    if context.plan.device.type != "cuda":
        return Row("decode", what, problem="skipped: CUDA graphs need a GPU")
    eager, replayed = _copy(cache), _copy(cache)
    try:
        replay, logits = _captured(model, replayed, token)
        for _ in range(WARM_UP):
            model(token, cache=eager)
        for _ in range(WARM_UP):
            replay()
            want = model(token, cache=eager).logits
            if (error := relative_error(logits.float(), want.float())) > SAME_REPLAY:
                return Row("decode", what, problem=f"not capturable: replays differ from steps by {error:.1e}")
    except RuntimeError as error:
        return Row("decode", what, problem=f"not capturable: {error}"[:200])

    def steps() -> None:
        for _ in range(context.plan.steps):
            replay()

    return _row(context, model, what, lengths, steps)


def _captured(model: Evo2, cache: Cache, token: torch.Tensor) -> tuple[Callable[[], object], torch.Tensor]:
    """Return the replay of a step that follows a few others, and where its logits appear."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            model(token, cache=cache)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, cache=cache).logits
    return graph.replay, logits


def _steps(model: Evo2, cache: Cache, token: torch.Tensor, count: int) -> None:
    for _ in range(count):
        token = model(token, cache=cache).logits[:, -1].argmax(dim=-1, keepdim=True)


def _prefill(context: Context, model: Evo2, prompts: Sequence[Prompt]) -> tuple[Cache, torch.Tensor]:
    return prefill(model, prompts, chunk=PREFILL_CHUNK, room=2 * context.plan.steps + 4 * WARM_UP)


def _prompt(length: int, seed: int) -> Prompt:
    letters = np.frombuffer(b"ACGT", dtype=np.uint8).astype(np.int64)
    return letters[np.random.default_rng(seed).integers(4, size=length)]


def _copy(cache: Cache) -> Cache:
    return cache.select(range(cache.batch_size))


def _bytes(model: Evo2, lengths: Sequence[int]) -> float:
    """Return what a step must move: weights once; per row keys and values, modal states and filter histories."""
    config = model.config
    width, short = config.hidden_size, config.short_filter_length - 1
    keys_and_values = 2 * BF16_BYTES * width * config.count(ATTENTION) * sum(lengths)
    modal = 2 * _FP32_BYTES * width * config.state_size * config.count(HCL)
    projection = 2 * BF16_BYTES * 3 * width * short * (config.num_layers - config.count(ATTENTION))
    medium = BF16_BYTES * width * (config.hcm_filter_length - 1) * config.count(HCM)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + keys_and_values + len(lengths) * (modal + projection + medium)
