"""Samples: the tokens, targets and weights of sample number n, read and masked on the spot.

Plain Python, no Ray: the Ray source, evaluation and tests all call ``iterate_samples``. Reading one row decodes one
small Parquet row group, and the last few are kept, so neighbouring reads cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cistron.alphabets import NUCLEOTIDES, TAG_DELIMITER
from cistron.data.mask import IGNORED, mask_tokens
from cistron.data.plan import Sample, SamplePlan, sample_rng
from cistron.errors import InputError
from cistron.io import storage
from cistron.tokenizers import ProteinTokenizer

_MASK_STREAM: Final = 1
_CASE_BIT: Final = 32
_BASES: Final = tuple(NUCLEOTIDES.encode("ascii"))
_OPEN_SHARDS: Final = 32
_CACHED_ROW_GROUPS: Final = 64


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One document, ready for the model.

    Attributes:
        sample_index: its number in the run.
        input_ids: [L] int32.
        targets: [L] int32, -100 where nothing is asked.
        weights: [L] float32, 0 where nothing is asked.
    """

    sample_index: int
    input_ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]


def iterate_samples(plan: SamplePlan, indices: Iterable[int]) -> Iterator[TrainingSample]:
    """Yield the samples of those numbers, in that order.

    Raises:
        InputError: a number is negative, or a shard cannot be read.
    """
    for sample_index in indices:
        yield read_sample(plan, plan.locate(sample_index))


def held_out_samples(plan: SamplePlan, indices: Iterable[int]) -> Iterator[TrainingSample]:
    """Yield samples as evaluation scores them: of a masked sample, only what stands behind a ``<mask>``.

    In training a tenth of the targets is left visible and a tenth replaced; counting those would reward copying.
    """
    for sample in iterate_samples(plan, indices):
        yield hidden_only(sample) if plan.objective == "masked" else sample


def hidden_only(sample: TrainingSample) -> TrainingSample:
    """Return a masked sample without the targets that do not stand behind a ``<mask>``."""
    hidden = sample.input_ids == ProteinTokenizer.mask_id
    return replace(
        sample,
        targets=np.where(hidden, sample.targets, IGNORED).astype(np.int32),
        weights=np.where(hidden, sample.weights, 0).astype(np.float32),
    )


def read_sample(plan: SamplePlan, sample: Sample) -> TrainingSample:
    """Read, mask and weigh one sample."""
    row = _read_row(plan, sample)
    if plan.objective == "next_token":
        tokens = next_token(row, sample.start, sample.length, lowercase_weight=plan.lowercase_weight)
    else:
        ids = _protein_ids(row, sample.start, sample.length, keep_ends=plan.keep_ends)
        rng = sample_rng(plan.seed, sample.sample_index, stream=_MASK_STREAM)
        input_ids, targets = mask_tokens(ids, rng=rng, probability=plan.mask_probability, replacement=plan.replacement)
        tokens = (input_ids, targets, (targets != IGNORED).astype(np.float32))
    input_ids, targets, weights = tokens
    return TrainingSample(sample.sample_index, input_ids.astype(np.int32), targets.astype(np.int32), weights)


def next_token(
    row: NDArray[np.uint8], start: int, length: int, *, lowercase_weight: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return inputs, targets and weights of a window of DNA.

    Inputs are upper case; the case of a letter only decides its weight as a target. Targets are the four bases: neither
    ambiguity codes nor control characters nor the letters of a tag are learnt. The whole row is needed, because only it
    tells whether the window begins inside a tag.

    Args:
        row: [R] bytes as stored; a row never begins inside a tag.
        start: first letter of the window.
        length: letters of the window.
        lowercase_weight: weight of lower-case targets.

    Returns:
        input_ids [L], targets [L] (the last is -100: the next document is none of its business), weights [L].
    """
    window = row[start : start + length]
    upper = np.where((window >= ord("a")) & (window <= ord("z")), window - _CASE_BIT, window).astype(np.int64)
    scored = np.isin(upper, _BASES) & ~_inside_tag(window, delimiters_before=_count_delimiters(row[:start]))
    targets = np.full(length, IGNORED, dtype=np.int64)
    targets[:-1] = np.where(scored, upper, IGNORED)[1:]
    weights = np.zeros(length, dtype=np.float32)
    weights[:-1] = (scored * np.where(upper == window, 1.0, lowercase_weight))[1:]
    return upper, targets, weights


def to_table(samples: Iterable[TrainingSample]) -> pa.Table:
    """Return an Arrow table of one row, which holds all samples: Ray may cut tables between rows, but not in one."""
    rows = list(samples)
    return pa.table(
        {
            "sample_index": _nest(pa.array([row.sample_index for row in rows], pa.int64())),
            "input_ids": _nest(_ragged([row.input_ids for row in rows], pa.int32())),
            "targets": _nest(_ragged([row.targets for row in rows], pa.int32())),
            "weights": _nest(_ragged([row.weights for row in rows], pa.float32())),
        }
    )


def from_table(table: pa.Table) -> list[TrainingSample]:
    """Return the samples of a table of :func:`to_table`, or of several such tables in one; nothing is copied."""
    numbers = [number for row in table.column("sample_index") for number in row.as_py()]
    columns = [
        [sample.values.to_numpy(zero_copy_only=True) for row in table.column(name) for sample in row.values]
        for name in ("input_ids", "targets", "weights")
    ]
    return [TrainingSample(*sample) for sample in zip(numbers, *columns, strict=True)]


def _read_row(plan: SamplePlan, sample: Sample) -> NDArray[np.uint8]:
    """Return the stored bytes of the row of `sample`."""
    index = plan.index
    shard = index.shards[sample.shard]
    group, row = divmod(sample.row, index.manifest.rows_per_group)
    rows = _row_group(storage.join(index.path, shard.file), shard.sha256, group)
    return np.frombuffer(rows[row].as_buffer(), dtype=np.uint8)


# The hash in the cache keys keeps a corpus that was made anew at the same path apart from the old one.
@lru_cache(maxsize=_CACHED_ROW_GROUPS)
def _row_group(file: str, sha256: str, group: int) -> pa.ChunkedArray:
    try:
        return _open_shard(file, sha256).read_row_group(group, columns=["tokens"]).column("tokens")
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: row group {group} cannot be read ({reason}); the shard is damaged") from error


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(file: str, sha256: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_input(file), pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file}: not a Parquet file ({error}); the shard is damaged") from error


def _protein_ids(row: NDArray[np.uint8], start: int, length: int, *, keep_ends: bool) -> NDArray[np.int64]:
    """Return the ids of a crop, ``<cls>`` and ``<eos>`` at the true ends of the protein, or with `keep_ends` always."""
    first = [ProteinTokenizer.cls_id] if keep_ends or start == 0 else []
    last = [ProteinTokenizer.eos_id] if keep_ends or start + length == len(row) else []
    return np.concatenate([first, row[start : start + length], last]).astype(np.int64)


def _inside_tag(window: NDArray[np.uint8], *, delimiters_before: int) -> NDArray[np.bool_]:
    """Return [L] true from the opening ``|`` of a tag to the letter before its closing one."""
    return (delimiters_before + np.cumsum(window == ord(TAG_DELIMITER))) % 2 == 1


def _count_delimiters(letters: NDArray[np.uint8]) -> int:
    return int(np.count_nonzero(letters == ord(TAG_DELIMITER)))


def _ragged(arrays: list[NDArray[np.int32]] | list[NDArray[np.float32]], kind: pa.DataType) -> pa.ListArray:
    """Return one list per array."""
    offsets = np.cumsum([0, *(len(array) for array in arrays)])
    values = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def _nest(column: pa.Array) -> pa.ListArray:
    """Return `column` as the only value of a list column."""
    return pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column)
