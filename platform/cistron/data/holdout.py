"""Which rows are held out for validation, decided where they are read.

Rows of a corpus without clusters are drawn one by one. Clusters are drawn whole: two members of one are half identical
at least, so a model that trained on one would be examined on what it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cistron.data.clusters import ClusterMap
from cistron.data.hashing import drawn, hash_names
from cistron.data.mapping import CLUSTER_COLUMN, MEMBER_COLUMN, Mapping
from cistron.data.rows import RowFormat
from cistron.errors import ConfigError, InputError
from cistron.io import storage
from cistron.io.storage import PathLike

TRAIN: Final = "train"
VALID: Final = "valid"

Unmapped = Literal["error", "drop"]


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Where clusters are named, as ``prepare_data`` is told.

    Attributes:
        clusters: file of the mapping; ``None`` where the input says it itself, or where there are no clusters.
        cluster_column: Parquet column of the clusters' ids, in the mapping or, without one, in the input; ``None`` is
            ``ur50_id`` in a mapping, and no clusters without.
        member_column: Parquet column of the members' ids in the mapping; ``None`` is ``ur90_id``.
        unmapped: whether a sequence that the mapping does not name is an error or left out.
    """

    clusters: PathLike | None = None
    cluster_column: str | None = None
    member_column: str | None = None
    unmapped: Unmapped = "error"

    def mapping(self, form: RowFormat, paths: Sequence[str]) -> Mapping | None:
        """Return where it is written which row of the input `paths` belongs to which cluster; None without clusters.

        Raises:
            ConfigError: the settings contradict each other.
        """
        if self.clusters is None and self.cluster_column is None:
            if self.member_column is not None or self.unmapped != "error":
                raise ConfigError("member_column and unmapped apply to clusters: set clusters, or cluster_column")
            return None
        if form.alphabet != "protein":
            raise ConfigError(f"clusters are of proteins, but alphabet={form.alphabet}")
        if self.clusters is None:
            return self._own_mapping(form, paths)
        columns = (self.cluster_column or CLUSTER_COLUMN, self.member_column or MEMBER_COLUMN)
        return Mapping((storage.absolute(self.clusters),), *columns)

    def _own_mapping(self, form: RowFormat, paths: Sequence[str]) -> Mapping:
        """Return the mapping that the input is itself."""
        assert self.cluster_column is not None, "there are clusters, and no file of them"
        if form.name_column is None:
            raise ConfigError(f"cluster_column={self.cluster_column} needs name_column, the input's column of members")
        if self.member_column is not None:
            raise ConfigError("member_column is of a mapping; name_column is the input's column of members")
        return Mapping(tuple(paths), self.cluster_column, form.name_column)


class Holdout(Protocol):
    """How rows are divided."""

    def select(self, table: pa.Table, split: str) -> pa.Table:
        """Return the rows of `table` (see ``ROW_SCHEMA``) that belong to `split`."""
        ...


@dataclass(frozen=True, slots=True)
class RowHoldout:
    """Rows drawn by a hash of the seed, the record's name and the row's start.

    Attributes:
        seed: of the draw.
        fraction: share of the rows for validation.
    """

    seed: int
    fraction: float

    def select(self, table: pa.Table, split: str) -> pa.Table:
        """See :meth:`Holdout.select`."""
        pairs = zip(table.column("name").to_pylist(), table.column("start").to_pylist(), strict=True)
        held_out = drawn((f"{self.seed}:{start}:{name}" for name, start in pairs), share=self.fraction)
        return table.filter(pa.array(held_out if split == VALID else ~held_out))


@dataclass(frozen=True, eq=False)
class ClusterHoldout:
    """Whole clusters, drawn by a hash of the seed and the cluster's id.

    Attributes:
        clusters: which row belongs to which.
        held_out: [clusters] true where a cluster is for validation.
        paths: path of each input file, by its number.
        unmapped: what to do with a sequence of no cluster.
    """

    clusters: ClusterMap
    held_out: NDArray[np.bool_]
    paths: Sequence[str]
    unmapped: Unmapped

    def select(self, table: pa.Table, split: str) -> pa.Table:
        """See :meth:`Holdout.select`.

        Raises:
            InputError: a row belongs to no cluster, and such rows are not to be dropped; names its file and line.
        """
        places = self.clusters.find(hash_names(table.column("name").to_pylist()))
        mapped = places >= 0
        if self.unmapped == "error" and not mapped.all():
            self._refuse(table, int(mapped.argmin()))
        wanted = self.held_out[self.clusters.clusters[places]] == (split == VALID)
        return table.filter(pa.array(mapped & wanted))

    def _refuse(self, table: pa.Table, row: int) -> None:
        file, line, name = (table.column(column)[row].as_py() for column in ("file", "line", "name"))
        raise InputError(
            f"{self.paths[file]}, line {line}: record {name!r} is in no cluster of "
            f"{', '.join(self.clusters.mapping.paths)}; complete the mapping, or leave such records out (unmapped=drop)"
        )


def choose_holdout(
    clusters: ClusterMap | None, *, seed: int, fraction: float, paths: Sequence[str], unmapped: Unmapped
) -> Holdout:
    """Return how to hold out that fraction: of the clusters if there are any, otherwise of the rows."""
    if clusters is None:
        return RowHoldout(seed, fraction)
    held_out = drawn((f"{seed}:{name}" for name in clusters.names.to_pylist()), share=fraction)
    return ClusterHoldout(clusters, held_out, paths, unmapped)
