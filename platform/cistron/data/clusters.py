"""Members and their clusters, ready for look-ups while sequences stream by.

Members' ids are held as 64-bit hashes. The 187 million members of UniRef90 take some 10 GB of the driver's memory while
the mapping is read, and 5 GB on each node that prepares sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cistron.data.hashing import hash_names
from cistron.data.mapping import Mapping
from cistron.errors import InputError


@dataclass(frozen=True, eq=False)
class ClusterMap:
    """A mapping, ready for look-ups.

    Attributes:
        mapping: where it comes from.
        keys: [members] uint64, ascending hashes of the members' ids.
        pairs: [members] int64, number of the pair of each key, in the order of the mapping.
        clusters: [members] int32, number of the cluster of each key.
        names: [clusters] ids of the clusters, in the order of the mapping.
    """

    mapping: Mapping
    keys: NDArray[np.uint64]
    pairs: NDArray[np.int64]
    clusters: NDArray[np.int32]
    names: pa.StringArray

    @classmethod
    def load(cls, mapping: Mapping) -> ClusterMap:
        """Read a mapping.

        Raises:
            InputError: as :meth:`Mapping.read`, or a member stands in two pairs; names both lines.
        """
        batches = [(hash_names(pairs.members.to_pylist()), pairs.clusters) for pairs in mapping.read()]
        if not batches:
            raise InputError(f"{', '.join(mapping.paths)}: the mapping is empty")
        keys = np.concatenate([keys for keys, _ in batches])
        # Encoded before it is joined: a string array holds 2 GiB, and all ids together may be more.
        encoded = pa.chunked_array([ids for _, ids in batches]).dictionary_encode().unify_dictionaries()
        encoded = encoded.combine_chunks()
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if (same := keys[1:] == keys[:-1]).any():
            _refuse_repeated(mapping, order[same.argmax()], order[same.argmax() + 1])
        return cls(mapping, keys, order, encoded.indices.to_numpy()[order], encoded.dictionary)

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the place of each of `keys` in :attr:`keys`, or -1 where the mapping does not name it."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)

    def check_complete(self, keys: NDArray[np.uint64]) -> None:
        """Check that every member of the mapping is among `keys`.

        Raises:
            InputError: one is not; names its line.
        """
        places = self.find(keys)
        missing = np.bincount(places[places >= 0], minlength=len(self.keys)) == 0
        if missing.any():
            place, cluster, member = self.mapping.describe(int(self.pairs[missing].min()))
            raise InputError(
                f"{place}: member {member!r} of cluster {cluster!r} is not among the sequences "
                f"({int(missing.sum()):,} of {len(missing):,} members are not)"
            )

    def table(self, keys: NDArray[np.uint64]) -> pa.Table:
        """Return the clusters that the rows of a split make up.

        Args:
            keys: [rows] hash of each row's name, in the order of the split; the mapping names them all.

        Returns:
            One row per cluster, both in the order of the mapping: `cluster`, its id, and `rows`, the numbers of its
            rows.
        """
        places = self.find(keys)
        clusters = self.clusters[places]
        rows = np.lexsort((self.pairs[places], clusters))
        present, sizes = np.unique(clusters, return_counts=True)
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        return pa.table(
            {"cluster": self.names.take(pa.array(present)), "rows": pa.ListArray.from_arrays(offsets, pa.array(rows))}
        )


def _refuse_repeated(mapping: Mapping, first: int, second: int) -> None:
    earlier, cluster, member = mapping.describe(int(first))
    later, other, _ = mapping.describe(int(second))
    raise InputError(
        f"{later}: member {member!r} of cluster {other!r} already stands in cluster {cluster!r} ({earlier}); "
        "a member belongs to one cluster, once"
    )
