"""Who may take how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Share:
    """Seconds that a section may start new work in.

    Args:
        seconds: counted from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return not self.left

    def reason(self) -> str:
        """Return why work was skipped."""
        return f"skipped: the section's {self.seconds:.0f} s were spent"


class Allowance:
    """Seconds for something that happens now and then.

    Args:
        seconds: that it may take in all; what has begun goes on.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self._left <= 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Count the time of the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._left -= time.monotonic() - start
