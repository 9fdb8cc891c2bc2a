"""FASTA, plain or gzip-compressed, read in bounded memory.

Compression is recognised by its magic bytes, not by the file's name. Every error names the file and the line. Letters
are not judged here: which are allowed depends on the model, and :mod:`cistron.alphabets` says so.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, Final, NamedTuple, cast

from cistron.errors import InputError
from cistron.io import storage
from cistron.io.compressed import BUFFER_BYTES, open_decompressed
from cistron.io.storage import PathLike

_PIECE_LETTERS: Final = 1 << 16
_LINE_LETTERS: Final = 80


@dataclass(frozen=True, slots=True)
class FastaRecord:
    """One sequence.

    Attributes:
        name: first word of the header.
        description: rest of the header.
        sequence: letters as they stand in the file, line breaks removed.
        line: number of the header's line in its file, from 1; 0 for a record that was not read from a file.
    """

    name: str
    description: str
    sequence: str
    line: int = 0


class FastaHeader(NamedTuple):
    """Header of a record."""

    name: str
    description: str
    line: int


class FastaPiece(NamedTuple):
    """Consecutive letters of a record."""

    header: FastaHeader
    letters: str


def read_fasta(path: PathLike) -> Iterator[FastaRecord]:
    """Yield the records of the file at `path` in order, one in memory at a time.

    Raises:
        InputError: no such file; an empty one; one that does not begin with a header; a header without a name or a
            sequence; a compressed file that is cut short or damaged. Names the file and the line.
    """
    for header, pieces in groupby(scan_fasta(path), key=lambda piece: piece.header):
        sequence = "".join(piece.letters for piece in pieces)
        yield FastaRecord(header.name, header.description, sequence, header.line)


def scan_fasta(path: PathLike) -> Iterator[FastaPiece]:
    """Yield the letters of the file at `path` in pieces of about 64 KiB, each within one record.

    A chromosome never has to be in memory whole. The errors are those of :func:`read_fasta`.
    """
    header: FastaHeader | None = None
    letters: list[str] = []
    seen = held = 0
    for number, starts_line, text in _lines(path):
        if starts_line and text.startswith(b">"):
            if letters and header:
                yield FastaPiece(header, "".join(letters))
            _check_sequence(path, header, seen)
            header, letters, seen, held = _parse_header(path, number, text), [], 0, 0
        elif text := text.strip():
            if header is None:
                raise InputError(f"{path}, line {number}: the first line of a FASTA file must be a header ('>name')")
            letters.append(text.decode("latin-1"))
            seen, held = seen + len(text), held + len(text)
            if held >= _PIECE_LETTERS:
                yield FastaPiece(header, "".join(letters))
                letters, held = [], 0
    if header is None:
        raise InputError(f"{path}: the file is empty")
    if letters:
        yield FastaPiece(header, "".join(letters))
    _check_sequence(path, header, seen)


def write_fasta(path: PathLike, records: Iterable[FastaRecord]) -> None:
    """Write `records` to `path`, 80 letters a line, compressed when the name ends in ``.gz``; all of it or nothing."""
    with storage.open_output(path) as stream:
        # A time stamp in the gzip header would make equal contents different files.
        compress = gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) if str(path).endswith(".gz") else None
        target = cast(BinaryIO, compress or stream)
        for record in records:
            target.write(_format(record))
        if compress:
            compress.close()


def _format(record: FastaRecord) -> bytes:
    lines = [f">{record.name} {record.description}".rstrip()]
    lines += [record.sequence[i : i + _LINE_LETTERS] for i in range(0, len(record.sequence), _LINE_LETTERS)]
    return ("\n".join(lines) + "\n").encode("utf-8")


def _parse_header(path: PathLike, number: int, text: bytes) -> FastaHeader:
    name, *description = text[1:].decode("utf-8", errors="replace").split(maxsplit=1) or [""]
    if not name:
        raise InputError(f"{path}, line {number}: the header has no name ('>' must be followed by one)")
    return FastaHeader(name, "".join(description).strip(), number)


def _check_sequence(path: PathLike, header: FastaHeader | None, letters: int) -> None:
    if header is not None and not letters:
        raise InputError(f"{path}, line {header.line}: record {header.name!r} has no sequence")


def _lines(path: PathLike) -> Iterator[tuple[int, bool, bytes]]:
    """Yield (line number, whether the line starts here, text); a very long line comes in several parts."""
    number, starts_line = 1, True
    try:
        with open_decompressed(path) as stream:
            while text := stream.readline(BUFFER_BYTES):
                if number == 1 and starts_line:
                    text = text.removeprefix(codecs.BOM_UTF8)
                yield number, starts_line, text
                starts_line = text.endswith(b"\n")
                number += starts_line
    except EOFError as error:
        raise InputError(f"{path}, line {number}: the compressed file is cut short here") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}, line {number}: the compressed file is damaged ({error})") from error
