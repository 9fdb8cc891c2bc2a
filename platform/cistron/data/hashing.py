"""Hashes that are the same in every process: names are compared without being kept, and parts are drawn by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def hash_names(names: Iterable[str]) -> NDArray[np.uint64]:
    """Return 64 bits of each of `names`, [names] uint64."""
    return np.array([_hash(name) for name in names], dtype=np.uint64)


def drawn(names: Iterable[str], *, share: float) -> NDArray[np.bool_]:
    """Return [names] true for about that share of `names`; which ones depends on nothing but the names."""
    limit = round(share * 2**64)
    return np.array([_hash(name) < limit for name in names], dtype=bool)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
