"""Where the letters of a FASTA file lie: the ``.fai`` index of ``samtools faidx``, and reading through it.

A record's lines have one length, save the last, so a position on the sequence gives a position in the file. In a file
of ``bgzip``, positions are those of the uncompressed text, and the ``.gzi`` index says which block holds them.
"""

from __future__ import annotations

import io
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final, TypeAlias, cast

from cistron.errors import InputError
from cistron.io import storage
from cistron.io.storage import PathLike

_BUFFER_BYTES: Final = 1 << 20
_BLOCK_BYTES: Final = 1 << 16
_GZIP_WINDOW: Final = 31
"""zlib's code for a gzip member with the largest window."""

ReadAt: TypeAlias = Callable[[int, int], bytes]
"""(position, size) -> bytes of the text."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One record; the columns of a ``.fai`` line after the name.

    Attributes:
        length: letters.
        offset: position of the first letter in the text.
        line_letters: letters of a full line.
        line_bytes: bytes of a full line, its end included.
    """

    length: int
    offset: int
    line_letters: int
    line_bytes: int

    def position(self, letter: int) -> int:
        """Return where in the text a letter lies, counted from 0."""
        lines, rest = divmod(letter, self.line_letters)
        return self.offset + lines * self.line_bytes + rest

    def fetch(self, read_at: ReadAt, start: int, stop: int) -> str:
        """Return letters [start, stop).

        Raises:
            InputError: what lies there is not one record's sequence, so the index belongs to another file.
        """
        if start == stop:
            return ""
        first = self.position(start)
        text = read_at(first, self.position(stop - 1) + 1 - first)
        letters = text.replace(b"\n", b"").replace(b"\r", b"")
        if len(letters) != stop - start or b">" in letters:
            raise InputError("the FASTA index (.fai) does not fit its file; make it anew with `samtools faidx`")
        return letters.decode("latin-1")


FastaIndex: TypeAlias = Mapping[str, IndexEntry]


def read_index(path: PathLike) -> dict[str, IndexEntry]:
    """Read the ``.fai`` file beside `path`.

    Raises:
        InputError: a line that is not an index entry, or two records of one name.
    """
    index: dict[str, IndexEntry] = {}
    for number, line in enumerate(storage.read_text(f"{path}.fai").splitlines(), 1):
        name, *numbers = line.split("\t")
        if len(numbers) < 4 or not all(text.isdecimal() for text in numbers[:4]) or int(numbers[2]) < 1:
            raise InputError(f"{path}.fai, line {number}: not a line of a FASTA index: {line[:80]!r}")
        if name in index:
            raise InputError(f"{path}.fai, line {number}: a second record named {name!r}")
        index[name] = IndexEntry(*map(int, numbers[:4]))
    return index


def build_index(path: PathLike) -> dict[str, IndexEntry] | None:
    """Index a plain FASTA file by one pass over it; None when lines of a record differ in length.

    Raises:
        InputError: no such file, or two records of one name.
    """
    builder = _Builder(str(path))
    with storage.open_input(path) as native, io.BufferedReader(native, _BUFFER_BYTES) as stream:
        for line in cast(BinaryIO, stream):
            if not builder.add(line):
                return None
    return builder.finished()


class _Builder:
    """An index in the making, line by line."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._index: dict[str, IndexEntry] = {}
        self._name: str | None = None
        self._offset = self._start = self._length = self._letters = self._bytes = 0
        self._last = False

    def add(self, line: bytes) -> bool:
        """Note the next line; return false when the file has no index."""
        self._offset += len(line)
        if line.startswith(b">"):
            return self._begin(line)
        letters = len(line.strip())
        if not letters:
            self._last = True
            return True
        # Text before the first header, a line after a shorter one, or spaces around the letters: not to be indexed.
        if self._name is None or self._last or len(line.rstrip(b"\r\n")) != letters:
            return False
        if not self._length:
            self._letters, self._bytes = letters, len(line)
        self._length += letters
        self._last = letters != self._letters or len(line) != self._bytes
        return letters <= self._letters

    def finished(self) -> dict[str, IndexEntry] | None:
        """Return the index of all lines; None if a record is empty, which the FASTA reader explains."""
        return self._index if self._end() and self._index else None

    def _begin(self, line: bytes) -> bool:
        words = line[1:].split(maxsplit=1)
        if not self._end() or not words:
            return False
        self._name = words[0].decode("utf-8", errors="replace")
        self._start, self._length, self._last = self._offset, 0, False
        return True

    def _end(self) -> bool:
        if self._name is None:
            return True
        if self._name in self._index:
            raise InputError(f"{self._path}: two records are named {self._name!r}")
        self._index[self._name] = IndexEntry(self._length, self._start, self._letters, self._bytes)
        return self._length > 0


def file_reader(path: PathLike) -> ReadAt:
    """Return a reader of a plain file's bytes."""
    stream = storage.open_input(path)
    return lambda position, size: bytes(stream.read_at(size, position))


def bgzip_reader(path: PathLike) -> ReadAt:
    """Return a reader of the text of a file of ``bgzip``, by the ``.gzi`` index beside it.

    Raises:
        InputError: the index is not one of ``bgzip``.
    """
    content = storage.read_bytes(f"{path}.gzi")
    count = struct.unpack_from("<Q", content)[0] if len(content) >= 8 else -1
    if len(content) != 8 + 16 * count:
        raise InputError(f"{path}.gzi is not an index of bgzip; make it anew with `samtools faidx`")
    # The first block is not in the index: it begins at 0 in both.
    numbers = (0, 0, *struct.unpack_from(f"<{2 * count}Q", content, 8))
    compressed, uncompressed = numbers[::2], numbers[1::2]
    stream = storage.open_input(path)

    def read_at(position: int, size: int) -> bytes:
        block = bisect_right(uncompressed, position) - 1
        skipped = position - uncompressed[block]
        return _inflate(stream, compressed[block], skipped + size)[skipped:]

    return read_at


def _inflate(stream: BinaryIO, offset: int, size: int) -> bytes:
    """Return `size` bytes of text, or all there are, from the block that begins at `offset`."""
    stream.seek(offset)
    text, pending = bytearray(), b""
    while len(text) < size:
        member = zlib.decompressobj(_GZIP_WINDOW)
        while not member.eof:
            pending = pending or stream.read(_BLOCK_BYTES)
            if not pending:
                return bytes(text)
            text += member.decompress(pending)
            pending = member.unused_data if member.eof else b""
    return bytes(text[:size])
