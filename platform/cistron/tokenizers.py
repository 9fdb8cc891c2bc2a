"""Text to ids: bytes for Evo 2, the 33-token vocabulary for ESM-2.

Both tokenizers are table look-ups over bytes, so a million letters cost a few milliseconds. They only encode: what may
be encoded is decided at the door by :mod:`cistron.alphabets`, which each tokenizer's ``validate`` calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from cistron.alphabets import MASK, num_residues, refuse_dna, validate_dna, validate_protein

ESM2_TOKENS: Final = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO",
    *(".", "-", "<null_1>", "<mask>"),
)
"""ESM-2's vocabulary; a token's place is its id."""


class Tokenizer(Protocol):
    """What the rest of Cistron needs of a tokenizer."""

    vocab_size: int
    pad_id: int

    def validate(self, sequence: str, *, name: str = "sequence", max_length: int | None = None) -> str:
        """Return the sequence as it will be encoded, or raise ``SequenceError``."""
        ...

    def encode(self, sequence: str) -> NDArray[np.int64]:
        """Return the ids of a validated sequence, special tokens included."""
        ...

    def decode(self, ids: NDArray[np.int64] | list[int]) -> str:
        """Return the text of `ids`."""
        ...

    def num_letters(self, sequence: str) -> int:
        """Return how many nucleotides or residues a sequence has."""
        ...


class ByteTokenizer:
    """Evo 2's tokenizer: one id per byte, 512 rows in the embedding, of which 256 to 511 are padding.

    >>> ByteTokenizer().encode("ACGT").tolist()
    [65, 67, 71, 84]
    >>> ByteTokenizer().decode([65, 67, 300])
    'AC\ufffd'
    """

    vocab_size: int = 512
    eod_id: int = 0
    pad_id: int = 1
    bos_id: int = 0
    """Evo 2 has no token of its own for the beginning; the reference uses the end-of-document id."""

    def validate(self, sequence: str, *, name: str = "sequence", max_length: int | None = None) -> str:
        """Check `sequence` with :func:`cistron.alphabets.validate_dna`; `max_length` is in nt."""
        return validate_dna(sequence, name=name, max_length=max_length)

    def encode(self, sequence: str) -> NDArray[np.int64]:
        """Return int64 ids [L]: the letters' byte values."""
        return np.frombuffer(sequence.encode("latin-1"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: NDArray[np.int64] | list[int]) -> str:
        """Return one character per id: latin-1 for 0 to 255, U+FFFD above."""
        return "".join(chr(i) if i < 256 else "\ufffd" for i in np.asarray(ids).tolist())

    def num_letters(self, sequence: str) -> int:
        """Return the number of letters, those of tags included."""
        return len(sequence)


class ProteinTokenizer:
    """ESM-2's tokenizer: ``<cls>``, one id per residue, ``<eos>``.

    >>> ProteinTokenizer().encode("MKT<mask>").tolist()
    [0, 20, 15, 11, 32, 2]
    >>> ProteinTokenizer().decode([0, 20, 15, 11, 32, 2])
    'MKT<mask>'
    """

    vocab_size: int = len(ESM2_TOKENS)
    cls_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    mask_id: int = 32
    special_ids: tuple[int, ...] = (0, 1, 2, 3, 32)
    """Ids that masking never selects."""
    standard_ids: range = range(4, 24)
    """Ids of the 20 standard residues."""

    def __init__(self) -> None:
        self._table = np.full(256, self.unk_id, dtype=np.int64)
        for token_id, token in enumerate(ESM2_TOKENS):
            if len(token) == 1:
                self._table[ord(token)] = token_id

    def validate(self, sequence: str, *, name: str = "sequence", max_length: int | None = None) -> str:
        """Check with :func:`cistron.alphabets.validate_protein`, gaps allowed, and refuse DNA; return upper case."""
        residues = validate_protein(sequence, name=name, max_length=max_length, gaps=True)
        refuse_dna(residues, name=name)
        return residues

    def encode(self, sequence: str) -> NDArray[np.int64]:
        """Return int64 ids [L + 2] with ``<cls>`` and ``<eos>`` around the residues; ``<mask>`` is one residue."""
        residues = [self._residues(part) for part in sequence.split(MASK)]
        mask = np.array([self.mask_id])
        body = [piece for part in residues for piece in (part, mask)][:-1]
        return np.concatenate([[self.cls_id], *body, [self.eos_id]]).astype(np.int64)

    def decode(self, ids: NDArray[np.int64] | list[int]) -> str:
        """Return the residues' letters; ``<cls>``, ``<eos>`` and ``<pad>`` vanish."""
        hidden = {self.cls_id, self.eos_id, self.pad_id}
        return "".join(ESM2_TOKENS[i] for i in np.asarray(ids).tolist() if i not in hidden)

    def num_letters(self, sequence: str) -> int:
        """Return the number of residues; ``<mask>`` is one."""
        return num_residues(sequence)

    def _residues(self, text: str) -> NDArray[np.int64]:
        return self._table[np.frombuffer(text.encode("latin-1"), dtype=np.uint8)]


TOKENIZERS: Final[Mapping[str, Tokenizer]] = {"evo2": ByteTokenizer(), "esm2": ProteinTokenizer()}
"""By model family."""
