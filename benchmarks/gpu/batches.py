"""Packed training batches: random letters at the lengths of real training."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

import torch

from benchmarks.gpu.cases.case import offsets
from benchmarks.gpu.cases.mixing import documents
from benchmarks.gpu.flops import MASKED_SHARE
from cistron.io.fasta import read_fasta

PROTEINS: Final = Path(__file__).parents[2] / "jobs/cistron_jobs/sample_data/uniprot_2k.fasta.gz"
LONGEST_PROTEIN: Final = 1_022
"""Residues of a crop."""

_RESIDUES: Final = (4, 24)
_CLS, _EOS, _MASK = 0, 2, 32

Batch: TypeAlias = dict[str, torch.Tensor]
"""What a loss takes: ids, targets, weights, and offsets of the documents."""


def dna(document: int, device: torch.device, tokens: int, seed: int) -> Batch:
    """Return contexts of random nucleotides; each predicts the next, the last of a context nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(list(b"ACGT"))[torch.randint(4, (tokens,), generator=generator)]
    cu_seqlens = offsets(documents(tokens, [document]))
    targets = ids.roll(-1)
    targets[cu_seqlens[1:].long() - 1] = -100
    return _batch(device, ids, targets, cu_seqlens)


def proteins(device: torch.device, tokens: int, seed: int) -> Batch:
    """Return random residues at real proteins' lengths, the targets masked."""
    generator = torch.Generator().manual_seed(seed)
    lengths = random.Random(seed).sample(_protein_lengths(), len(_protein_lengths()))
    cu_seqlens = offsets(documents(tokens, lengths))
    ids = torch.randint(*_RESIDUES, (tokens,), generator=generator)
    ids[cu_seqlens[:-1].long()], ids[cu_seqlens[1:].long() - 1] = _CLS, _EOS
    chosen = torch.rand(tokens, generator=generator) < MASKED_SHARE
    targets = torch.where(chosen, ids, -100)
    return _batch(device, torch.where(chosen, _MASK, ids), targets, cu_seqlens)


@cache
def _protein_lengths() -> tuple[int, ...]:
    """Return the tokens of real proteins, cropped as in training."""
    return tuple(min(len(record.sequence), LONGEST_PROTEIN) + 2 for record in read_fasta(PROTEINS))


def _batch(device: torch.device, ids: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor) -> Batch:
    """Put a batch on the device, except its offsets, which are needed in host memory."""
    tensors = {"input_ids": ids, "targets": targets, "weights": (targets >= 0).float()}
    return {**{name: tensor.to(device) for name, tensor in tensors.items()}, "cu_seqlens": cu_seqlens}
