"""The model's thread: the only place of a replica where the model runs, so the event loop is always free.

A call is a score or embed request as it travels from the ingress. Calls with equal options run together in one library
call; a call that fails is tried again alone, so one request never decides another one's answer, and an error names the
index in its own request.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

from cistron.inference.embed import Embedding, embed_sequences
from cistron.inference.memory import return_freed_memory
from cistron.inference.score import SequenceScore, score_sequences
from cistron.models.base import SequenceModel

Result: TypeAlias = SequenceScore | Embedding
ResultT = TypeVar("ResultT")

BATCH_SLOTS: Final = 64
"""A batch has this many slots, which stand for the token budget; it is also the most calls that one batch merges."""

RETURN_INTERVAL_S: Final = 30.0
"""Seconds between two times that memory is given back: it takes tens of milliseconds, in which a batch waits."""

_OPERATIONS: Final[dict[str, Callable[..., Sequence[Result]]]] = {
    "score": score_sequences,
    "embed": embed_sequences,
}


@dataclass(frozen=True, slots=True)
class Call:
    """A score or embed request.

    Attributes:
        operation: which library function answers it.
        sequences: its first argument after the model.
        options: its keyword arguments.
        tokens: tokens that it runs through the model.
    """

    operation: Literal["score", "embed"]
    sequences: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    tokens: int

    @classmethod
    def of(
        cls, operation: Literal["score", "embed"], sequences: Sequence[str], options: Mapping[str, Any], *, tokens: int
    ) -> Call:
        """Return a call that can be compared with others; the values of `options` are hashable."""
        return cls(operation, tuple(sequences), tuple(options.items()), tokens)


@dataclass(frozen=True, slots=True)
class Slotted:
    """A call and the share of a batch that it takes.

    Serve compares batches with a fixed size, so the share of the token budget is counted in slots. A call above the
    budget takes a whole batch, and the library splits it.
    """

    call: Call
    slots: int

    @classmethod
    def of(cls, call: Call, *, token_budget: int) -> Slotted:
        """Return `call` with its share, at least one slot and at most all."""
        return cls(call, min(BATCH_SLOTS, math.ceil(call.tokens * BATCH_SLOTS / token_budget)))


def total_slots(batch: Sequence[Slotted]) -> int:
    """Return the size of a batch, for Serve."""
    return sum(item.slots for item in batch)


def run_calls(model: SequenceModel, calls: Sequence[Call], *, token_budget: int) -> list[list[Result] | Exception]:
    """Return each call's results, or the exception that it alone is answered with."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, call in enumerate(calls):
        groups.setdefault((call.operation, call.options), []).append(index)
    outcomes: dict[int, list[Result] | Exception] = {}
    for indices in groups.values():
        answers = _run_group(model, [calls[index] for index in indices], token_budget)
        outcomes.update(zip(indices, answers, strict=True))
    return [outcomes[index] for index in range(len(calls))]


def _run_group(model: SequenceModel, calls: Sequence[Call], token_budget: int) -> list[list[Result] | Exception]:
    """Run calls of one operation with equal options together."""
    operation, options = _OPERATIONS[calls[0].operation], dict(calls[0].options)
    sequences = [sequence for call in calls for sequence in call.sequences]
    try:
        results = iter(operation(model, sequences, **options, token_budget=token_budget))
    except Exception as error:  # Whatever it is, it becomes the answer of the one call that causes it.
        if len(calls) == 1:
            return [error]
        return [outcome for call in calls for outcome in _run_group(model, [call], token_budget)]
    return [[next(results) for _ in call.sequences] for call in calls]


class Worker:
    """One thread that runs one piece of work at a time, in order of arrival."""

    def __init__(self, *, on_wait: Callable[[float], None]) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._on_wait = on_wait
        self._last_return = time.monotonic()

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """Run `work` in the thread and return its result; a cancelled caller's work does not start."""
        submitted = time.monotonic()

        def timed() -> ResultT:
            self._on_wait(time.monotonic() - submitted)
            return work()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, timed)
        finally:
            self._return_freed_memory()

    def _return_freed_memory(self) -> None:
        """Do so after the answer and seldom, so that nobody waits for it and little time goes into it."""
        if (now := time.monotonic()) - self._last_return >= RETURN_INTERVAL_S:
            self._last_return = now
            self._executor.submit(return_freed_memory)
