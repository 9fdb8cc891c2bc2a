"""The variants of proteins, or the positions of whole proteins, cut into parts that share as few passes as possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple, Self

import pyarrow as pa
from pydantic import PositiveInt, model_validator

from cistron.errors import InputError, nearest
from cistron.inference.batching import TOKEN_BUDGET
from cistron.inference.protein_variants import VariantProblem, find_substitutions
from cistron.inference.protein_windows import residues_per_window
from cistron.inference.substitutions import ProteinStrategy, check_wild_type
from cistron.io.tables import Column, read_rows
from cistron_jobs.bulk.config import BulkConfig
from cistron_jobs.bulk.cut import cut
from cistron_jobs.bulk.output import ParquetPath
from cistron_jobs.inference_job import checked_records
from cistron_jobs.model_config import model_shell

_COLUMNS: Final = (
    Column("variant", pa.string(), also="mutant", blank=True),  # An empty cell is a variant that cannot be read.
    Column("protein", pa.string(), optional=True),
)
_RESIDUES: Final = pa.dictionary(pa.int32(), pa.large_string())
"""A protein that many rows share is held once."""
_VARIANTS: Final = pa.schema(
    [("record", pa.int64()), ("protein", pa.string()), ("variant", pa.string()), ("wild_type", _RESIDUES)]
)
_RANGES: Final = pa.schema(
    [("protein", pa.string()), ("start", pa.int64()), ("stop", pa.int64()), ("wild_type", _RESIDUES)]
)


class ProteinVariantsConfig(BulkConfig):
    """Settings of ``cistron protein_variants``."""

    reference: str
    """FASTA of the wild-type proteins; a path or URL."""
    input: str | None = None
    """Table (.tsv, .csv, .txt, each also .gz, or .parquet) with a column variant (or mutant): A23T, several joined as
    A23T:G45D, or HGVS such as p.Ala23Thr; and, unless the reference holds one protein, a column protein: its name
    there. null: every single substitution of every protein, as one row per position and one column per residue."""
    output: ParquetPath
    """Parquet file to write, in the order of the input: record (number of the input row, from 0), protein, variant,
    score in nats (negative: the model finds the variant less likely), status (scored, or why not) and detail. Without
    an input: protein, position (from 1), wild_type and the scores of the 20 residues there."""
    strategy: ProteinStrategy = "masked-marginal"
    """masked-marginal: one pass per replaced position; wt-marginal: one pass per protein; pseudo-ppl: the mutant's
    pseudo-log-likelihood minus the wild type's, in one pass per residue of every mutant."""
    window: PositiveInt | None = None
    """Residues that the model sees at once; longer proteins are read in windows. As many as it saw in training (1022)
    unless given."""
    on_mismatch: Literal["report", "error"] = "report"
    """A variant that cannot be read or contradicts its protein: report gives it a status and no score, error stops
    before anything is computed."""
    token_budget: PositiveInt = TOKEN_BUDGET
    """Most tokens of one forward pass."""
    records_per_part: PositiveInt = 1 << 14
    """Most variants, or positions ranges, of a part."""
    letters_per_part: PositiveInt = 1 << 20
    """Most residues that the passes of a part read; what its variants share is read once, so sort them by position."""

    @model_validator(mode="after")
    def _a_matrix_is_of_marginals(self) -> Self:
        if self.input is None and self.strategy == "pseudo-ppl":
            raise ValueError(
                "strategy=pseudo-ppl scores the variants of a table: give input=TABLE, or take masked-marginal"
            )
        return self


class _Row(NamedTuple):
    """A row of the input; `variant` is None in an empty cell, `wild_type` if the reference has no such protein."""

    record: int
    protein: str
    variant: str | None
    wild_type: str | None


def variant_parts(config: ProteinVariantsConfig) -> Iterator[pa.Table]:
    """Yield the variants of the table; cut where another part would cost less than the passes that are shared.

    Raises:
        InputError: an input that cannot be read, or a variant that cannot be scored if that is to stop.
    """
    part: list[_Row] = []
    passes: set[tuple[str, int | str]] = set()
    letters = 0
    size = _window(config)
    for row in _rows(config):
        own = _passes(row, config.strategy)
        added = len(own - passes) * _letters_per_pass(row.wild_type, config.strategy, size)
        if part and (len(part) == config.records_per_part or letters + added > config.letters_per_part):
            yield _table(part, _VARIANTS)
            part, passes, letters = [], set(), 0
            added = len(own) * _letters_per_pass(row.wild_type, config.strategy, size)
        part.append(row)
        passes |= own
        letters += added
    if part:
        yield _table(part, _VARIANTS)


def range_parts(config: ProteinVariantsConfig) -> Iterator[pa.Table]:
    """Yield ranges of positions of all proteins: whole proteins, but for those whose passes are more than a part's."""
    size = _window(config)
    ranges = (
        (protein, start, min(start + step, len(residues)), residues)
        for protein, residues in _proteins(config).items()
        for step in [_positions_per_part(config, residues, size)]
        for start in range(0, len(residues), step)
    )
    for part in cut(
        ranges,
        max_items=config.records_per_part,
        max_weight=config.letters_per_part,
        weight=lambda row: _range_letters(config, row[3], row[2] - row[1], size),
    ):
        yield _table(part, _RANGES)


def variant_problem(variant: str | None, wild_type: str | None) -> tuple[str, str] | None:
    """Return the status and the reason of a variant that has no score."""
    if wild_type is None:
        return "unknown_protein", "the reference has no protein of that name"
    if variant is None:
        return "malformed", "the cell is empty; write a variant as 'A23T' or 'p.Ala23Thr'"
    found = find_substitutions(variant, wild_type)
    return (found.status, found.message) if isinstance(found, VariantProblem) else None


def _rows(config: ProteinVariantsConfig) -> Iterator[_Row]:
    """Yield the rows of the input with their proteins."""
    assert config.input is not None, "without a table there are only positions"
    proteins = _proteins(config)
    for record, (variant, protein) in enumerate(read_rows(config.input, _COLUMNS)):
        name = _only_name(config, proteins, record) if protein is None else protein
        row = _Row(record, name, variant, proteins.get(name))
        if config.on_mismatch == "error" and (problem := variant_problem(variant, row.wild_type)):
            place = f"{config.input}, row {record + 1} ({name} {variant or ''!r})"
            guess = nearest(name, proteins) if row.wild_type is None else ""
            raise InputError(f"{place}: {problem[1]}{guess} ({problem[0]}; on_mismatch=report goes on)")
        yield row


def _proteins(config: ProteinVariantsConfig) -> dict[str, str]:
    """Return the wild types by name.

    Raises:
        InputError: two of one name.
        SequenceError: a record that is no protein, or holds an unknown residue or gaps.
    """
    proteins: dict[str, str] = {}
    lines: dict[str, int] = {}
    for record in checked_records(config, config.reference, _check):
        if record.name in proteins:
            where = f"lines {lines[record.name]} and {record.line}"
            raise InputError(f"{config.reference}: two records are named {record.name!r} ({where}): which is meant?")
        proteins[record.name], lines[record.name] = record.sequence, record.line
    return proteins


def _check(sequence: str, place: str) -> None:
    check_wild_type(sequence, name=place)


def _only_name(config: ProteinVariantsConfig, proteins: Mapping[str, str], record: int) -> str:
    if len(proteins) == 1:
        return next(iter(proteins))
    raise InputError(
        f"{config.input}, row {record + 1}: protein is missing, and {config.reference} holds {len(proteins)} proteins"
    )


def _window(config: ProteinVariantsConfig) -> int:
    return residues_per_window(model_shell(config), config.window, longest=0)


def _passes(row: _Row, strategy: ProteinStrategy) -> set[tuple[str, int | str]]:
    """Return what is read of the protein for a variant: the same for variants that share it."""
    if row.wild_type is None or row.variant is None:
        return set()
    found = find_substitutions(row.variant, row.wild_type)
    if isinstance(found, VariantProblem) or not found:
        return set()
    if strategy == "wt-marginal":
        return {(row.protein, "")}
    if strategy == "pseudo-ppl":
        return {(row.protein, ""), (row.protein, row.variant)}
    return {(row.protein, substitution.position) for substitution in found}


def _letters_per_pass(residues: str | None, strategy: ProteinStrategy, size: int) -> int:
    length = len(residues or "")
    if strategy == "masked-marginal":
        return min(length, size)
    return length if strategy == "wt-marginal" else length * min(length, size)


def _positions_per_part(config: ProteinVariantsConfig, residues: str, size: int) -> int:
    """Return how many positions of a protein fit a part; the unmasked protein is read once for all of them."""
    if config.strategy == "wt-marginal":
        return len(residues)
    return max(1, config.letters_per_part // min(len(residues), size))


def _range_letters(config: ProteinVariantsConfig, residues: str, positions: int, size: int) -> int:
    passes = 1 if config.strategy == "wt-marginal" else positions
    return passes * _letters_per_pass(residues, config.strategy, size)


def _table(rows: Sequence[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    columns = [list(column) for column in zip(*rows, strict=True)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns[:-1], schema, strict=False)]
    wild_types = pa.array(columns[-1], pa.large_string()).dictionary_encode()
    return pa.table([*arrays, wild_types.cast(_RESIDUES)], schema=schema)
