"""Server-sent events of the native dialect: ``chunk`` ..., ``usage``, ``done``; or ``error``, shaped as a problem.

Once the first byte is out the HTTP status cannot change, so a later fault is an event of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Final

from pydantic import BaseModel

from cistron.inference.generate import Generation
from cistron_serve.errors import ApiError, internal_error, problem
from cistron_serve.schemas.native import ChunkEvent, DoneEvent, FinishedGeneration, ModelCard, Usage
from cistron_serve.streaming import Chunk

logger = logging.getLogger(__name__)

_PING: Final = ": ping\n\n"
Items = AsyncIterator[Chunk | list[Generation] | None]


def format_event(name: str, data: BaseModel, *, event_id: int | None = None) -> str:
    """Return one event in the wire format of the W3C's EventSource."""
    identifier = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\n{identifier}data: {data.model_dump_json()}\n\n"


async def events(items: Items, card: ModelCard, *, prompt_tokens: int, request_id: str) -> AsyncIterator[str]:
    """Yield the events of an admitted generation; ending this iterator ends the generation."""
    start, sent = time.monotonic(), 0
    try:
        async for item in items:
            if item is None:
                yield _PING
            elif isinstance(item, Chunk):
                sent += len(item.token_ids)
                yield format_event("chunk", _chunk_event(item), event_id=sent)
            else:
                elapsed_ms = round(1000 * (time.monotonic() - start))
                usage = Usage(prompt_tokens=prompt_tokens, generated_tokens=sent, elapsed_ms=elapsed_ms)
                yield format_event("usage", usage)
                yield format_event("done", _done_event(item, card))
    except ApiError as error:
        yield format_event("error", problem(error, request_id))
    except Exception:
        logger.exception("request %s failed in its stream", request_id)
        yield format_event("error", problem(internal_error(), request_id))


def _chunk_event(chunk: Chunk) -> ChunkEvent:
    return ChunkEvent(
        index=chunk.index, offset=chunk.offset, text=chunk.text, token_ids=chunk.token_ids, logprobs=chunk.logprobs
    )


def _done_event(generations: list[Generation], card: ModelCard) -> DoneEvent:
    finished = [
        FinishedGeneration(index=index, num_tokens=len(result.token_ids), finish_reason=result.finish_reason)
        for index, result in enumerate(generations)
    ]
    return DoneEvent(model=card.id, system_fingerprint=card.fingerprint, generations=finished)
