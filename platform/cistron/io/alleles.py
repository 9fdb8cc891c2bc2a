"""Alternative alleles to score, one by one, from VCF, BCF, TSV, CSV or Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from cistron.errors import InputError
from cistron.io import storage
from cistron.io.compressed import open_decompressed
from cistron.io.storage import PathLike
from cistron.io.vcf import NO_ALT, VCF_SUFFIXES, read_vcf

_SCHEMA: Final = {"chrom": pa.string(), "pos": pa.int64(), "ref": pa.string(), "alt": pa.string()}
_DELIMITERS: Final = {".tsv": "\t", ".txt": "\t", ".csv": ","}
_PARQUET: Final = ".parquet"
_SUFFIXES: Final = (*VCF_SUFFIXES, *_DELIMITERS, *(f"{suffix}.gz" for suffix in _DELIMITERS), _PARQUET)


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

    A table has the columns chrom, pos (1-based), ref and alt, in any case and order, among others.

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
    number = 0
    for batch in _batches(path):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if None in row:
                name = list(_SCHEMA)[row.index(None)]
                raise InputError(f"{path}, row {number + 1}: {name} is missing")
            yield Allele(number, *row)
            number += 1


def is_vcf(path: PathLike) -> bool:
    """Return whether a file's name says VCF or BCF."""
    return str(path).endswith(VCF_SUFFIXES)


def _batches(path: PathLike) -> Iterator[pa.RecordBatch]:
    """Yield the four columns of a table, piece by piece."""
    try:
        if str(path).endswith(_PARQUET):
            with storage.open_input(path) as stream:
                file = pq.ParquetFile(stream)
                names = _columns(path, file.schema_arrow.names)
                for batch in file.iter_batches(columns=names):
                    yield batch.select(names).cast(pa.schema(list(zip(names, _SCHEMA.values(), strict=True))))
        else:
            with _open_csv(path) as reader:
                yield from reader
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: {str(error).partition(chr(10))[0]}") from error


@contextmanager
def _open_csv(path: PathLike) -> Iterator[csv.CSVStreamingReader]:
    suffix = next(suffix for suffix in _DELIMITERS if str(path).removesuffix(".gz").endswith(suffix))
    parse = csv.ParseOptions(delimiter=_DELIMITERS[suffix])
    with open_decompressed(path) as stream:
        header = stream.readline().decode("utf-8-sig").rstrip("\r\n")
        found = [name.strip('"') for name in header.split(_DELIMITERS[suffix])]
        names = _columns(path, found)
        convert = csv.ConvertOptions(
            include_columns=names,
            column_types=dict(zip(names, _SCHEMA.values(), strict=True)),
            # An allele or contig may be called NA; only nothing is missing.
            null_values=[""],
            strings_can_be_null=True,
        )
        yield csv.open_csv(
            stream, read_options=csv.ReadOptions(column_names=found), parse_options=parse, convert_options=convert
        )


def _columns(path: PathLike, found: list[str]) -> list[str]:
    """Return the file's own names of the four columns."""
    by_name = {name.lstrip("#").lower(): name for name in found}
    for name in _SCHEMA:
        if name not in by_name:
            raise InputError(f"{path}: there is no column {name!r} (found: {', '.join(found)})")
    return [by_name[name] for name in _SCHEMA]
