"""What is kept of the representations of a sequence that reaches the model in pieces.

A piece is a whole sequence, a chunk of one, or, of a long protein, a window. Special tokens belong to no residue: they
never enter a mean or a per-residue result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cistron.inference.protein_windows import ProteinWindow

Pooling: TypeAlias = Literal["mean", "cls", "last", "none"]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a batch.

    Attributes:
        index: of the sequence that it belongs to.
        ids: [L] its tokens.
        letters: the nucleotides or residues of the sequence that it holds, and their weights.
        num_special: special tokens at either end.
    """

    index: int
    ids: NDArray[np.int64]
    letters: ProteinWindow
    num_special: int


class Pool:
    """One layer's representations of one sequence.

    Args:
        pooling: what to keep of them.
        num_letters: nucleotides or residues of the sequence.
    """

    def __init__(self, pooling: Pooling, num_letters: int) -> None:
        self.pooling = pooling
        self.num_letters = num_letters
        self.wanted = range(num_letters - 1 if pooling == "last" else 0, num_letters)
        self.total: NDArray[np.float64] | float = 0.0
        self.vectors: NDArray[np.float32] | None = None

    def add(self, row: Row, start: int, states: torch.Tensor) -> None:
        """Read the representations [piece, H] of a row's tokens from `start` on."""
        if self.pooling == "cls":
            share = row.letters.share / self.num_letters
            self.total = self.total + states[0].cpu().double().numpy() * share
            return
        begin = row.letters.start + start - row.num_special
        first = max(self.wanted.start, row.letters.start, begin)
        stop = min(self.wanted.stop, row.letters.stop, begin + len(states))
        if first >= stop:
            return
        part = states[first - begin : stop - begin]
        if (weights := row.letters.weights) is not None:
            chosen = torch.from_numpy(weights[first - row.letters.start : stop - row.letters.start]).float()
            part = part.float() * chosen[:, None].to(part.device)
        if self.pooling == "mean":
            self.total = self.total + part.sum(dim=0, dtype=torch.float32).cpu().double().numpy()
        else:
            self._keep(first - self.wanted.start, part.float().cpu().numpy())

    def result(self) -> NDArray[np.float32]:
        """Return [H], or [num_letters, H] with pooling ``none``."""
        if self.pooling in ("mean", "cls"):
            divisor = self.num_letters if self.pooling == "mean" else 1
            return (np.asarray(self.total) / divisor).astype(np.float32)
        assert self.vectors is not None, "every sequence has a token"
        return self.vectors if self.pooling == "none" else self.vectors[0]

    def _keep(self, first: int, part: NDArray[np.float32]) -> None:
        if self.vectors is None:
            self.vectors = np.zeros((len(self.wanted), part.shape[1]), dtype=np.float32)
        self.vectors[first : first + len(part)] += part
