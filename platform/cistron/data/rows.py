"""Sequence files to rows: the unit that is shuffled, split and stored.

A DNA record is cut into rows of at most `row_length` nt, never inside a tag (so that every row can be read without its
neighbours); a protein is one row. Tokens are stored as one byte each, without special tokens; DNA keeps its case, which
says what is repetitive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from cistron.alphabets import TAG_DELIMITER, refuse_dna, validate_dna, validate_protein
from cistron.data.index import Alphabet
from cistron.errors import InputError, SequenceError
from cistron.io import storage
from cistron.io.fasta import scan_fasta
from cistron.tokenizers import ProteinTokenizer

_PARQUET_MAGIC = b"PAR1"
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        name: of the record.
        line: line of the record's header (FASTA) or number of the record's row (Parquet), from 1.
        start: letters of the record before this row.
        tokens: one byte per letter.
    """

    name: str
    line: int
    start: int
    tokens: bytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read rows from, or one row group of a Parquet file.

    Attributes:
        path: absolute, or a URL.
        number: place of the file in the order of the corpus.
        row_group: ``None`` for FASTA.
        first_row: rows of the Parquet file before this row group.
    """

    path: str
    number: int
    row_group: int | None = None
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How records become rows.

    Attributes:
        alphabet: what the letters are.
        row_length: longest DNA row in nt; ignored for proteins.
        sequence_column: Parquet column of the letters.
        name_column: Parquet column of the names; ``None`` names a record by its file and row.
    """

    alphabet: Alphabet
    row_length: int
    sequence_column: str
    name_column: str | None = None


def find_sources(paths: list[str], form: RowFormat) -> list[SourceFile]:
    """Return what is to be read, in order: files as given, the files of a folder by name, Parquet by row group.

    Raises:
        InputError: a path does not exist, a folder is empty, or a Parquet file is damaged or lacks a column.
    """
    files = [file for path in paths for file in (_visible(path) if storage.is_directory(path) else [path])]
    if repeated := sorted({file for file in files if files.count(file) > 1}):
        raise InputError(f"{repeated[0]}: given more than once")
    return [part for number, file in enumerate(files) for part in _split_file(storage.absolute(file), number, form)]


def read_rows(source: SourceFile, form: RowFormat) -> Iterator[Row]:
    """Yield the rows of `source` in order, validated.

    Raises:
        InputError: the file is damaged or malformed; names the line.
        SequenceError: a letter outside the alphabet, or DNA in a corpus of proteins; names file, record and position.
    """
    if form.alphabet == "dna":
        for name, line, pieces in _read_records(source, form):
            for start, letters in _cut(source.path, name, pieces, form.row_length):
                label = _label(source.path, name, line)
                yield Row(name, line, start, validate_dna(letters, name=label, offset=start).encode("latin-1"))
    else:
        tokenizer = ProteinTokenizer()
        for name, line, pieces in _read_records(source, form):
            label = _label(source.path, name, line)
            residues = validate_protein("".join(pieces), name=label)
            refuse_dna(residues, name=label)
            yield Row(name, line, 0, tokenizer.encode(residues)[1:-1].astype("uint8").tobytes())


def _cut(path: str, name: str, pieces: Iterator[str], row_length: int) -> Iterator[tuple[int, str]]:
    """Yield (start, letters) of each row of a record that arrives in pieces."""
    start, held = 0, ""
    for piece in pieces:
        held += piece
        while len(held) > row_length:
            end = _end_of_row(held, row_length)
            if end == 0:
                raise SequenceError(
                    f"{path}: record {name!r}: the tag at position {start + 1} is longer than row_length={row_length}"
                )
            yield start, held[:end]
            start, held = start + end, held[end:]
    yield start, held


def _end_of_row(letters: str, row_length: int) -> int:
    """Return where the row ends: at `row_length`, or before the tag that this would cut."""
    inside_tag = letters.count(TAG_DELIMITER, 0, row_length) % 2
    return letters.rfind(TAG_DELIMITER, 0, row_length) if inside_tag else row_length


def _read_records(source: SourceFile, form: RowFormat) -> Iterator[tuple[str, int, Iterator[str]]]:
    """Yield name, line and pieces of each record; the pieces must be consumed before the next record."""
    if source.row_group is None:
        for header, pieces in groupby(scan_fasta(source.path), key=lambda piece: piece.header):
            yield header.name, header.line, (piece.letters for piece in pieces)
    else:
        for name, row, sequence in _read_parquet(source, form):
            yield name, row, iter([sequence])


def _read_parquet(source: SourceFile, form: RowFormat) -> Iterator[tuple[str, int, str]]:
    """Yield name, row number and sequence of the records of a row group."""
    columns = [form.sequence_column, *([form.name_column] if form.name_column else [])]
    with storage.open_input(source.path) as stream:
        batches = pq.ParquetFile(stream).iter_batches(_PARQUET_BATCH_ROWS, [source.row_group], columns)
        row = source.first_row
        for record in (record for batch in batches for record in batch.to_pylist()):
            row += 1
            for column in columns:
                if not isinstance(record[column], str):
                    raise InputError(f"{source.path}, row {row}: column {column!r} holds {record[column]!r}, not text")
            file = storage.name_of(source.path)
            yield record[form.name_column] if form.name_column else f"{file}:{row}", row, record[form.sequence_column]


def _split_file(path: str, number: int, form: RowFormat) -> list[SourceFile]:
    """Return one source for a FASTA file, or one per row group of a Parquet file."""
    with storage.open_input(path) as stream:
        if stream.read(len(_PARQUET_MAGIC)) != _PARQUET_MAGIC:
            return [SourceFile(path, number)]
        stream.seek(0)
        try:
            metadata = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: damaged Parquet file ({error})") from error
        _check_columns(path, metadata.schema.to_arrow_schema().names, form)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return [SourceFile(path, number, group, sum(sizes[:group])) for group in range(len(sizes))]


def _check_columns(path: str, present: list[str], form: RowFormat) -> None:
    for setting, column in (("sequence_column", form.sequence_column), ("name_column", form.name_column)):
        if column is not None and column not in present:
            raise InputError(f"{path}: no column {column!r} (has: {', '.join(present)}); set {setting}")


def _visible(folder: str) -> list[str]:
    """Return the files of a folder, hidden ones left out."""
    files = [file for file in storage.list_files(folder) if not storage.name_of(file).startswith((".", "_"))]
    if not files:
        raise InputError(f"{folder}: the folder holds no files")
    return files


def _label(path: str, name: str, line: int) -> str:
    return f"{path}: record {name!r} (line {line})"
