"""From tokens made in the model's thread to chunks awaited on the event loop, and back: cancellation.

The producer calls ``push`` for every token; the consumer iterates over chunks of up to 64 tokens. When the consumer
goes away it calls ``cancel``, and the next ``push`` raises ``Cancelled`` inside the model's thread, which ends the
generation and frees its state.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from cistron.tokenizers import ByteTokenizer

CHUNK_TOKENS: Final = 64
CHUNK_SECONDS: Final = 0.5
"""A chunk is sent when it is full, or when it is this old and another token arrives."""
SILENCE_SECONDS: Final = 15.0
"""After this long without a chunk the client gets a sign of life, so that proxies keep the connection open."""


class Cancelled(Exception):
    """Raised in the model's thread when nobody waits for the generation any more."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one generation; `offset` counts those before them."""

    index: int
    offset: int
    token_ids: list[int]
    logprobs: list[float]

    @property
    def text(self) -> str:
        """Letters of the tokens."""
        return ByteTokenizer().decode(self.token_ids)


@dataclass(slots=True)
class _Pending:
    """Tokens of one generation that wait for their chunk to fill."""

    offset: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    since: float = 0.0

    def is_due(self, now: float) -> bool:
        return len(self.token_ids) >= CHUNK_TOKENS or now - self.since >= CHUNK_SECONDS

    def take(self, index: int) -> Chunk:
        chunk = Chunk(index, self.offset, self.token_ids, self.logprobs)
        self.offset += len(self.token_ids)
        self.token_ids, self.logprobs = [], []
        return chunk


class TokenStream:
    """One generate call between the model's thread and the event loop; create it on the loop."""

    def __init__(self, num_prompts: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self._pending = [_Pending() for _ in range(num_prompts)]
        self._cancelled = threading.Event()

    def push(self, index: int, token_id: int, logprob: float) -> None:
        """Add a token; called in the model's thread.

        Raises:
            Cancelled: the consumer went away.
        """
        self.check()
        pending, now = self._pending[index], time.monotonic()
        if not pending.token_ids:
            pending.since = now
        pending.token_ids.append(token_id)
        pending.logprobs.append(logprob)
        if pending.is_due(now):
            self._send(pending.take(index))

    def check(self) -> None:
        """Raise ``Cancelled`` if the consumer went away; called in the model's thread."""
        if self._cancelled.is_set():
            raise Cancelled

    def finish(self) -> None:
        """Send what is left and end the iteration; called in the model's thread, whatever became of the generation."""
        for index, pending in enumerate(self._pending):
            if pending.token_ids:
                self._send(pending.take(index))
        self._send(None)

    def cancel(self) -> None:
        """End the generation at its next token."""
        self._cancelled.set()

    async def chunks(self) -> AsyncIterator[Chunk | None]:
        """Yield chunks in the order in which they became due, and None after each long silence."""
        while True:
            try:
                chunk = await asyncio.wait_for(self._chunks.get(), SILENCE_SECONDS)
            except TimeoutError:
                yield None
                continue
            if chunk is None:
                return
            yield chunk

    def _send(self, item: Chunk | None) -> None:
        if not self._cancelled.is_set():
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, item)
