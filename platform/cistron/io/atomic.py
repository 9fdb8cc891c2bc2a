"""Files and folders that exist wholly or not at all.

The context managers hand out a hidden sibling of the destination, or a path in one, so that the final rename stays on
one filesystem. An exception inside the block, an interrupt included, removes what was written and leaves the
destination as it was.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    with _sibling(destination) as staging:
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
    with _sibling(destination) as staging:
        try:
            yield staging
            staging.replace(destination)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


@contextmanager
def new_files(destination: str | Path) -> Iterator[Path]:
    """Yield a path of the same name to write to, for formats that may put further files beside it.

    When the block ends well, all that is there moves to the folder of `destination`.

    Raises:
        InputError: `destination`, or a file of the name of another that was written, exists.
    """
    destination = Path(destination)
    _refuse_existing(destination)
    with _sibling(destination) as staging:
        try:
            staging.mkdir()
            yield staging / destination.name
            written = sorted(staging.iterdir(), key=lambda path: path.name == destination.name)
            for path in written:
                _refuse_existing(destination.with_name(path.name))
            for path in written:  # Destination itself last: where it is, all is.
                path.rename(destination.with_name(path.name))
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _refuse_existing(destination: Path) -> None:
    if destination.exists():
        raise InputError(f"destination {destination} already exists; remove it or choose another")


@contextmanager
def _sibling(destination: Path) -> Iterator[Path]:
    """Yield an unused hidden path beside `destination`; the suffix is kept.

    Folders above it are made if need be, and go again when the block fails.
    """
    made = [folder for folder in destination.parents if not folder.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield destination.parent / f".{destination.stem}.{uuid.uuid4().hex[:12]}.part{destination.suffix}"
    except BaseException:
        for folder in made:  # The innermost first; one that others use by now is not empty and stays.
            with suppress(OSError):
                folder.rmdir()
        raise
