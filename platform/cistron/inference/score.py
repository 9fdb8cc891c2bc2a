"""How likely the model finds a sequence.

Evo 2 reads left to right, so a sequence's score is the log-likelihood of each nucleotide given those before it. ESM-2
sees both sides, so the score is the pseudo-log-likelihood: each residue's log-probability with that residue masked, one
forward pass per residue (:mod:`cistron.inference.masked`). Log-probabilities are natural, over the whole vocabulary,
taken in fp32, summed in fp64. Evo 2's come from the representation before its head, so that logits are not rounded to
the model's precision and never exist as a whole.

A DNA sequence above the token budget enters the model in chunks of that size, so memory grows only by the keys and
values of attention layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cistron.alphabets import TAG_DELIMITER
from cistron.alphabets import reverse_complement as reverse_complemented
from cistron.errors import InputError, SequenceError
from cistron.inference.batching import (
    TOKEN_BUDGET,
    check_token_budget,
    checked_sequences,
    length_sorted_batches,
    padded,
)
from cistron.inference.chunked import forward_chunks
from cistron.inference.finite import without_nan
from cistron.inference.masked import masked_log_probs
from cistron.inference.protein_windows import check_window
from cistron.models.base import SequenceModel
from cistron.models.evo2.model import Evo2
from cistron.models.naming import FINAL_NORM
from cistron.tokenizers import ByteTokenizer
from cistron_kernels.cross_entropy import score_logprob

Reduction: TypeAlias = Literal["mean", "sum", "none"]
LogProbs: TypeAlias = NDArray[np.float32]

_ROWS_PER_SOFTMAX = 4096
"""Positions whose log-probabilities are taken in bf16 at once: bounds the copies of a chunk's logits."""


@dataclass(frozen=True, slots=True)
class SequenceScore:
    """Score of one sequence.

    Attributes:
        score: mean or sum of the tokens' log-probabilities; with reduction ``none``, the sum. The mean over no token is
            NaN.
        num_tokens: number of tokens that were scored.
        per_token: float32 [num_tokens] with reduction ``none``, else None.
    """

    score: float
    num_tokens: int
    per_token: NDArray[np.float32] | None = None


@torch.inference_mode()
def score_sequences(
    model: SequenceModel,
    sequences: Iterable[str],
    *,
    reduction: Reduction = "mean",
    reverse_complement: bool = False,
    prepend_bos: bool = False,
    vortex_compat: bool = False,
    window: int | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[SequenceScore]:
    """Score sequences; results come in the order of the request and do not depend on what shared a batch.

    Args:
        model: Evo 2 (log-likelihood) or ESM-2 (pseudo-log-likelihood).
        sequences: DNA or protein.
        reduction: ``mean`` or ``sum`` over tokens, or ``none`` for the sum together with every token's value.
        reverse_complement: DNA only; the average of both strands' scores.
        prepend_bos: DNA only; begin with id 0, so that the first nucleotide is scored too. Without it a sequence of L
            nucleotides has L - 1 scored tokens.
        vortex_compat: DNA only; take log-probabilities of logits rounded to bf16, in bf16, as the published losses do.
        window: protein only; residues around a masked one that the model sees, its trained length (1,022) unless given.
        token_budget: most tokens of one forward pass, padding included; a longer DNA sequence takes several.

    Raises:
        InputError: the request is empty or an option does not apply.
        SequenceError: a sequence the model cannot read; names its index, the letter and its position.
        CapabilityError: the model returned NaN.
    """
    if reduction not in get_args(Reduction):
        raise InputError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    check_window(model, window)
    check_token_budget(token_budget)
    if isinstance(model, Evo2):
        checked = checked_sequences(model, sequences)
        strands = _strands(checked, reduction) if reverse_complement else [checked]
        scores = [
            sequence_log_probs(
                model, strand, prepend_bos=prepend_bos, vortex_compat=vortex_compat, token_budget=token_budget
            )
            for strand in strands
        ]
        return [_reduced(per_strand, reduction) for per_strand in zip(*scores, strict=True)]
    options = {"reverse_complement": reverse_complement, "prepend_bos": prepend_bos, "vortex_compat": vortex_compat}
    for option in (name for name, is_set in options.items() if is_set):
        raise InputError(f"{option} applies to DNA models, and this is {model.family}")
    checked = checked_sequences(model, sequences, whole=False)
    found = masked_log_probs(model, checked, window=window, token_budget=token_budget)
    return [_reduced([values], reduction) for values in found]


def sequence_log_probs(
    model: Evo2,
    sequences: Sequence[str],
    *,
    prepend_bos: bool = False,
    vortex_compat: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> list[LogProbs]:
    """Return each validated sequence's log-probabilities, float32 [L - 1], or [L] with `prepend_bos`."""
    prefix = np.array([ByteTokenizer.bos_id] if prepend_bos else [], dtype=np.int64)
    rows = [np.concatenate([prefix, model.tokenizer.encode(sequence)]) for sequence in sequences]
    results: dict[int, LogProbs] = {}
    for batch in length_sorted_batches([len(row) for row in rows], token_budget=token_budget):
        ids, mask = padded([rows[i] for i in batch], pad_id=model.tokenizer.pad_id, device=model.device)
        values = np.empty((len(batch), ids.shape[1] - 1), dtype=np.float32)
        outputs = forward_chunks(
            model, ids, mask, chunk=token_budget, hidden_states=[FINAL_NORM], with_logits=vortex_compat
        )
        for start, output in outputs:
            targets = ids[:, start + 1 : start + 1 + output.logits.shape[1]]
            if vortex_compat:
                found = _rounded_log_probs(output.logits[:, : targets.shape[1]], targets)
            else:
                hidden = output.hidden_states[FINAL_NORM][:, : targets.shape[1]]
                found = score_logprob(hidden.flatten(0, 1), model.head, targets.flatten()).view(targets.shape)
            values[:, start : start + targets.shape[1]] = found.cpu().numpy()
        results.update({index: without_nan(values[row, : len(rows[index]) - 1]) for row, index in enumerate(batch)})
    return [results[index] for index in range(len(rows))]


def _strands(sequences: Sequence[str], reduction: Reduction) -> list[Sequence[str]]:
    if reduction == "none":
        raise InputError(
            "reverse_complement averages two strands, whose tokens are at different places: use reduction mean or sum, "
            "or score the strands one by one"
        )
    for index, sequence in enumerate(sequences):
        if TAG_DELIMITER in sequence:
            raise SequenceError(f"sequence {index}: a phylogenetic tag ({TAG_DELIMITER}) has no reverse complement")
    return [sequences, [reverse_complemented(sequence) for sequence in sequences]]


def _rounded_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log p(target) [B, L] as the published losses do, in bf16, for logits [B, L, V] and targets [B, L]."""
    pieces = [
        part.bfloat16().log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0].float()
        for part, ids in zip(_pieces(logits), _pieces(targets), strict=True)
    ]
    return torch.cat(pieces, dim=1)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(torch.split(tensor, max(1, _ROWS_PER_SOFTMAX // tensor.shape[0]), dim=1))


def _reduced(strands: Sequence[LogProbs], reduction: Reduction) -> SequenceScore:
    """Reduce one sequence's log-probabilities, averaged over its strands."""
    num_tokens = len(strands[0])
    total = float(np.mean([values.sum(dtype=np.float64) for values in strands]))
    if reduction == "mean":
        return SequenceScore(total / num_tokens if num_tokens else float("nan"), num_tokens)
    return SequenceScore(total, num_tokens, strands[0] if reduction == "none" else None)
