"""Files and folders that exist wholly or not at all.

Both context managers hand out a hidden sibling of the destination, so that the final rename stays on one filesystem. An
exception inside the block, an interrupt included, removes what was written and leaves the destination as it was.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cistron.errors import InputError


@contextmanager
def new_directory(destination: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends well.

    Raises:
        InputError: `destination` exists and is not an empty folder.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"destination {destination} already exists; remove it or choose another")
    staging = _sibling(destination)
    staging.mkdir()
    try:
        yield staging
        staging.rename(destination)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def new_file(destination: str | Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces `destination` when the block ends well.

    Raises:
        InputError: `destination` is a folder.
    """
    destination = Path(destination)
    if destination.is_dir():
        raise InputError(f"{destination} is a folder; name a file in it")
    staging = _sibling(destination)
    try:
        yield staging
        staging.replace(destination)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def _sibling(destination: Path) -> Path:
    """Return an unused hidden path beside `destination`, whose parent is made if need be; the suffix is kept."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    return destination.parent / f".{destination.stem}.{uuid.uuid4().hex[:12]}.part{destination.suffix}"
