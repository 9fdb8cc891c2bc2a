"""Cut a stream of records into the parts of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def cut(items: Iterable[T], *, max_items: int, max_weight: int, weight: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield consecutive items as lists of at most `max_items` items and `max_weight` weight; a heavier item goes alone.

    >>> list(cut(["AC", "G", "TTTTT", "A", "C", "G"], max_items=2, max_weight=4, weight=len))
    [['AC', 'G'], ['TTTTT'], ['A', 'C'], ['G']]
    """
    part: list[T] = []
    total = 0
    for item in items:
        added = weight(item)
        if part and (len(part) == max_items or total + added > max_weight):
            yield part
            part, total = [], 0
        part.append(item)
        total += added
    if part:
        yield part
