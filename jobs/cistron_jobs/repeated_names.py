"""Names that several records of a FASTA file have, found without keeping the names.

Eight bytes of each are kept, so that tens of millions of records cost a few hundred megabytes. Where two are equal, the
file's headers are read once more to say on which lines.
"""

from __future__ import annotations

import logging
from itertools import groupby
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cistron.io.fasta import FastaHeader, scan_fasta

logger = logging.getLogger(__name__)

_SHOWN: Final = 3


def warn_of_repeated_names(job: str, path: str, hashes: NDArray[np.uint64]) -> None:
    """Log once how many records of the FASTA file at `path` have the name of an earlier one, and which come first.

    Args:
        job: what the records are read for.
        path: of the file, plain or compressed.
        hashes: [records] of the names, of :func:`cistron.data.hashing.hash_names`, in the order of the file.
    """
    _, firsts, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earliest = firsts[inverse]
    repeats = np.flatnonzero(earliest != np.arange(len(hashes)))
    if not len(repeats):
        return
    pairs = [(int(earliest[record]), int(record)) for record in repeats[:_SHOWN]]
    headers = _headers(path, {record for pair in pairs for record in pair})
    examples = [
        f"{headers[second].name!r} (lines {headers[first].line} and {headers[second].line}, "
        f"records {first} and {second})"
        for first, second in pairs
    ]
    logger.warning(
        "%s: %s of %s records of %s have the name of an earlier one, the first: %s; the column record tells them apart",
        *(job, f"{len(repeats):,}", f"{len(hashes):,}", path, ", ".join(examples)),
    )


def _headers(path: str, records: set[int]) -> dict[int, FastaHeader]:
    """Return the headers of the records with these numbers; reads no further than the last of them."""
    found: dict[int, FastaHeader] = {}
    for number, (header, _) in enumerate(groupby(scan_fasta(path), key=lambda piece: piece.header)):
        if number in records:
            found[number] = header
        if len(found) == len(records):
            break
    return found
