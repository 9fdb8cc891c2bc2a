"""VCF and BCF, line by line: what is read of a record is its place and alleles.

Lines are handed on as they are, so that a copy of a file with more in it (:mod:`cistron.io.vcf_annotation`) keeps the
rest to the letter. BCF has no lines: its records are those that htslib prints.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO, Final, NamedTuple

from cistron.errors import CapabilityError, InputError
from cistron.io import storage
from cistron.io.compressed import open_decompressed
from cistron.io.storage import PathLike

VCF_SUFFIXES: Final = (".vcf", ".vcf.gz", ".vcf.bgz", ".bcf")
NO_ALT: Final = "."
FIXED_COLUMNS: Final = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")

_BCF_MAGIC: Final = b"BCF"


class VcfRecord(NamedTuple):
    """Place and alleles of a record.

    Attributes:
        chrom: name of the contig.
        pos: 1-based position of the first letter of `ref`.
        ref: reference allele.
        alts: alternative alleles as they are written, symbolic ones included; empty when the column says ``.``.
    """

    chrom: str
    pos: int
    ref: str
    alts: tuple[str, ...]


def read_vcf(path: PathLike) -> Iterator[VcfRecord]:
    """Yield the records of a VCF (plain or compressed) or BCF file in order, one in memory at a time.

    Raises:
        InputError: no such file, a damaged one, one without its header, or a line that is no record; names the line.
        CapabilityError: BCF without pysam.
    """
    for number, line in read_lines(path):
        if not line.startswith("#"):
            yield parse_record(path, number, line)


def parse_record(path: PathLike, number: int, line: str) -> VcfRecord:
    """Return the record of a line; file and number are what errors name.

    Raises:
        InputError: the line is no record.
    """
    columns = line.rstrip("\r\n").split("\t", len(FIXED_COLUMNS))
    if len(columns) < len(FIXED_COLUMNS):
        raise InputError(f"{path}, line {number}: a record has 8 columns or more, separated by tabs: {line[:80]!r}")
    chrom, pos, _, ref, alt = columns[:5]
    if not pos.isdecimal():
        raise InputError(f"{path}, line {number}: POS must be a whole number, got {pos!r}")
    return VcfRecord(chrom, int(pos), ref, () if alt == NO_ALT else tuple(alt.split(",")))


def read_lines(path: PathLike) -> Iterator[tuple[int, str]]:
    """Yield (line number, line with its end), the header first; blank lines are left out.

    Raises:
        InputError: a record before the header's last line, or a damaged file.
    """
    number, has_columns = 0, False
    try:
        with _open_text(path) as lines:
            for number, raw in enumerate(lines, 1):
                # What is no UTF-8 comes out as it went in.
                line = raw.decode("utf-8", errors="surrogateescape")
                if number == 1:
                    line = line.removeprefix("\ufeff")
                has_columns = has_columns or line.rstrip("\r\n").split("\t")[: len(FIXED_COLUMNS)] == [*FIXED_COLUMNS]
                if line.strip() and not line.startswith("#") and not has_columns:
                    break
                if line.strip():
                    yield number, line
    except EOFError as error:
        raise InputError(f"{path}, line {number}: the compressed file is cut short here") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}, line {number}: the compressed file is damaged ({error})") from error
    if not has_columns:
        raise InputError(f"{path}: not a VCF file: it has no line that begins with {' '.join(FIXED_COLUMNS)}")


@contextmanager
def _open_text(path: PathLike) -> Iterator[Iterable[bytes]]:
    with open_decompressed(path) as stream:
        magic = stream.read(len(_BCF_MAGIC))
        if magic != _BCF_MAGIC:
            yield _rejoined(magic, stream)
            return
    if not storage.is_local(path):
        raise InputError(f"{path}: BCF is read from a local disk only; copy it, or use VCF")
    with require_pysam(f"reading {path}").VariantFile(storage.resolve(path)[1]) as file:
        header = (line.encode() for line in str(file.header).splitlines(keepends=True))
        yield chain(header, (str(record).encode() for record in file))


def _rejoined(magic: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a stream of which the first bytes were read already."""
    first, newline, rest = (magic + stream.readline()).partition(b"\n")
    yield from (line for line in (first + newline, rest) if line)
    yield from stream


def require_pysam(purpose: str) -> Any:
    """Return the pysam package.

    Raises:
        CapabilityError: it is not installed.
    """
    try:
        import pysam
    except ImportError as error:
        raise CapabilityError(f"{purpose} needs pysam: pip install 'cistron[bio]'") from error
    return pysam
