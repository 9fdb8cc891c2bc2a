"""What may be asked of a generation: prompts that leave room, counts, and where to stop; checked before it begins."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from numbers import Integral

from cistron.errors import InputError, SequenceError

logger = logging.getLogger(__name__)


def check_counts(num_tokens: int, prefill_chunk: int) -> None:
    """Raise ``InputError`` unless both are whole numbers in range."""
    for name, value, least in (("num_tokens", num_tokens, 0), ("prefill_chunk", prefill_chunk, 1)):
        if not isinstance(value, Integral) or value < least:
            raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}")


def check_room(prompts: Sequence[str], num_tokens: int, max_length: int, *, extend_context: bool) -> None:
    """Refuse, or with `extend_context` mention, prompts that leave no room for `num_tokens`.

    Raises:
        SequenceError: a prompt and its continuation would be longer than `max_length`.
    """
    for index, prompt in enumerate(prompts):
        if excess := no_room(len(prompt), num_tokens, max_length):
            if not extend_context:
                raise SequenceError(f"prompt {index}: {excess}; extend_context=True generates beyond it")
            logger.warning("prompt %d: %s, as extend_context allows", index, excess)


def no_room(length: int, num_tokens: int, max_length: int) -> str:
    """Return why a prompt of `length` nt leaves no room, or nothing."""
    if length + num_tokens <= max_length:
        return ""
    return f"{length:,} nt and {num_tokens:,} new tokens exceed the model's limit of {max_length:,}"


def parsed_stops(
    stop: str | int | Iterable[str | int], *, allowed: str | None, vocab_size: int
) -> tuple[tuple[str, ...], frozenset[int]]:
    """Return the strings and the ids at which to stop.

    A stop that the alphabet rules out is taken, as clients send such stops by habit, but mentioned: nothing will match
    it.

    Raises:
        InputError: a stop that is neither text nor a token id, or an empty text.
    """
    stops = (stop,) if isinstance(stop, str | int | Integral) else tuple(stop)
    for item in stops:
        if item == "":
            raise InputError("stop: an empty string would stop every continuation before it begins")
        if not (isinstance(item, str) or (isinstance(item, Integral) and 0 <= item < vocab_size)):
            raise InputError(f"stop: {item!r} is neither a string nor a token id from 0 to {vocab_size - 1}")
        letters = item if isinstance(item, str) else chr(item)
        if allowed is not None and not set(letters) <= set(allowed):
            logger.warning("stop: %r can never be generated, as only the letters %s are allowed", item, allowed)
    strings = tuple(item for item in stops if isinstance(item, str))
    return strings, frozenset(int(item) for item in stops if not isinstance(item, str))
