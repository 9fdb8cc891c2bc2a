"""Compressed text, recognised by its magic bytes and not by the file's name."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final, cast

from cistron.io import storage
from cistron.io.storage import PathLike

BUFFER_BYTES: Final = 1 << 20
GZIP_MAGIC: Final = b"\x1f\x8b"


@contextmanager
def open_decompressed(path: PathLike) -> Iterator[BinaryIO]:
    """Open the file at `path` for reading; gzip, and so bgzip, is decompressed on the way.

    Raises:
        InputError: there is no file.
    """
    with storage.open_input(path) as native, io.BufferedReader(native, BUFFER_BYTES) as raw:
        if raw.peek(2)[:2] != GZIP_MAGIC:
            yield cast(BinaryIO, raw)
            return
        with gzip.GzipFile(fileobj=raw, mode="rb") as text:
            yield cast(BinaryIO, text)
