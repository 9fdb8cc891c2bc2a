"""Alternative alleles to score, one by one, from VCF, BCF, TSV, CSV or Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import pyarrow as pa

from cistron.errors import InputError
from cistron.io.storage import PathLike
from cistron.io.tables import TABLE_SUFFIXES, Column, read_rows
from cistron.io.vcf import NO_ALT, VCF_SUFFIXES, read_vcf

_COLUMNS: Final = (
    Column("chrom", pa.string()),
    Column("pos", pa.int64()),
    Column("ref", pa.string()),
    Column("alt", pa.string()),
)
_SUFFIXES: Final = (*VCF_SUFFIXES, *TABLE_SUFFIXES)


class Allele(NamedTuple):
    """One alternative allele.

    Attributes:
        record: number of its record or row in the file, from 0.
        chrom: name of the contig.
        pos: 1-based position of the first letter of `ref`.
        ref: reference allele.
        alt: alternative allele as it is written; ``.`` for a record without one.
    """

    record: int
    chrom: str
    pos: int
    ref: str
    alt: str


def read_alleles(path: PathLike) -> Iterator[Allele]:
    """Yield the alternative alleles of a file in order; a record with several yields several.

    A table has the columns chrom, pos (1-based), ref and alt, in any case and order, among others; a comma separates
    several alternatives, as in VCF.

    Raises:
        InputError: no such file, a name that says no known format, or a file or line that cannot be read.
    """
    if is_vcf(path):
        for number, record in enumerate(read_vcf(path)):
            for alt in record.alts or (NO_ALT,):
                yield Allele(number, record.chrom, record.pos, record.ref, alt)
        return
    if not str(path).endswith(_SUFFIXES):
        raise InputError(f"{path}: variants are read from files named {', '.join(_SUFFIXES)}")
    for number, (chrom, pos, ref, alts) in enumerate(read_rows(path, _COLUMNS)):
        for alt in alts.split(","):
            yield Allele(number, chrom, pos, ref, alt)


def is_vcf(path: PathLike) -> bool:
    """Return whether a file's name says VCF or BCF."""
    return str(path).endswith(VCF_SUFFIXES)
