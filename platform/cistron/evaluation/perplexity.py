"""Loss per scored token on the held-out part of a corpus, beside baselines on the very same positions.

Evo 2: every base of every window that has a base before it; lower case counts like upper case here. ESM-2: what a
:data:`MaskProtocol` says; the masks depend on the seed and the sample alone. The loss is the sum over all scored tokens
divided by their number, not a mean of means, and perplexity is its exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import torch

from cistron.data.index import CorpusIndex
from cistron.data.pack import pack
from cistron.data.plan import SamplePlan
from cistron.data.samples import TrainingSample, held_out_samples, iterate_samples
from cistron.errors import ConfigError
from cistron.evaluation.baselines import markov_entropy, order_zero_entropy, unigram_entropy
from cistron.io.storage import PathLike
from cistron.models.base import Objective, SequenceModel
from cistron_kernels.cross_entropy import cross_entropy

MaskProtocol = Literal["hidden", "published"]
"""Which targets of a masked model count.

``hidden``: residues behind a ``<mask>`` only, because copying a visible residue is no achievement; random replacements
are residues. ``published``: all that were selected, also the tenth that is left visible and the tenth that is replaced,
the latter by any of the 33 tokens: what NVIDIA's published perplexities of ESM-2 were measured by, with seed 42.
"""

PROTOCOL_TEXTS: Final[dict[MaskProtocol, str]] = {
    "hidden": "residues behind <mask> only",
    "published": "all selected residues, visible and replaced ones included; replacements from all 33 tokens",
}
"""The protocols in words."""


@dataclass(frozen=True, slots=True)
class CorpusLoss:
    """A model's loss on one split.

    Attributes:
        loss: mean negative log-likelihood of a scored token, nats.
        num_tokens: scored tokens.
        num_samples: documents.
    """

    loss: float
    num_tokens: int
    num_samples: int

    @property
    def perplexity(self) -> float:
        """Number of equally likely letters that would be as hard to guess."""
        return math.exp(self.loss)


def evaluate_corpus(
    model: SequenceModel,
    corpus: PathLike,
    split: str = "valid",
    *,
    max_length: int,
    seed: int = 0,
    max_samples: int | None = None,
    token_budget: int = 16_384,
    protocol: MaskProtocol = "hidden",
) -> CorpusLoss:
    """Score one epoch of a split, or its first `max_samples` samples.

    Args:
        model: in eval mode, on its device.
        corpus: folder or URL that `prepare_data` wrote.
        split: name of the split.
        max_length: longest document, nt or residues.
        seed: of order, crops and masks.
        max_samples: most documents to score; all if not given.
        token_budget: most tokens in one forward pass; a longer document runs alone.
        protocol: which targets of a masked model count.

    Raises:
        ConfigError: the corpus holds another alphabet than the model reads, or a model of DNA has no such `protocol`.
        InputError: the corpus cannot be read, or nothing in it is scored.
    """
    plan = open_plan(corpus, split, objective=model.objective, max_length=max_length, seed=seed, protocol=protocol)
    return score_samples(model, read_samples(plan, max_samples, protocol=protocol), token_budget=token_budget)


def open_plan(
    corpus: PathLike,
    split: str,
    *,
    objective: Objective,
    max_length: int,
    seed: int,
    protocol: MaskProtocol = "hidden",
) -> SamplePlan:
    """Return the fixed order, crops and masks of a split under which every target weighs the same.

    A DNA corpus whose rows are shorter than `max_length` is read row by row.

    Raises:
        ConfigError, InputError: as :func:`evaluate_corpus`.
    """
    if protocol != "hidden" and objective != "masked":
        raise ConfigError(f"protocol={protocol} is of masked models such as ESM-2; this one predicts the next token")
    index = CorpusIndex.open(corpus, split)
    row_length = index.manifest.row_length
    length = max_length if row_length is None else min(max_length, row_length)
    return SamplePlan(
        index,
        objective=objective,
        max_length=length,
        seed=seed,
        lowercase_weight=1.0,
        replacement="vocabulary" if protocol == "published" else "standard",
    )


def read_samples(
    plan: SamplePlan, max_samples: int | None, *, protocol: MaskProtocol = "hidden"
) -> list[TrainingSample]:
    """Return the first samples of a plan, at most one epoch of them, with the targets that count."""
    read = held_out_samples if protocol == "hidden" else iterate_samples
    return list(read(plan, range(min(plan.samples_per_epoch, max_samples or plan.samples_per_epoch))))


@torch.inference_mode()
def score_samples(model: SequenceModel, samples: Sequence[TrainingSample], *, token_budget: int) -> CorpusLoss:
    """Return the mean loss of `samples`; sums are taken in double precision.

    Raises:
        ConfigError: nothing is scored.
    """
    longest = max((len(sample.input_ids) for sample in samples), default=0)
    losses, weights = [], []
    for batch in pack(samples, token_budget=max(token_budget, longest)):
        batch = batch.to(model.device)
        logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits
        loss, weight = cross_entropy(logits, batch.targets, batch.weights)
        losses.append(loss.item())
        weights.append(weight.item())
    if not math.fsum(weights):
        raise ConfigError("nothing to score: no sample has a target")
    return CorpusLoss(math.fsum(losses) / math.fsum(weights), round(math.fsum(weights)), len(samples))


def baseline_losses(
    train: SamplePlan, valid: Sequence[TrainingSample], *, max_samples: int | None, order: int
) -> dict[str, float]:
    """Return the loss per scored token of each baseline, nats, by name.

    Args:
        train: plan of the training split, to count.
        valid: the samples that the model was scored on.
        max_samples: most training samples to count; one epoch if not given.
        order: bases of context of the Markov chain; proteins have a unigram model instead.
    """
    count = min(train.samples_per_epoch, max_samples or train.samples_per_epoch)
    fit: Callable[..., float]
    if train.objective == "next_token":
        name, fit = f"markov order {order}", partial(markov_entropy, order=order)
    else:
        name, fit = "unigram", unigram_entropy
    return {
        name: fit(iterate_samples(train, range(count)), valid),
        "order 0, held-out's own": order_zero_entropy(valid),
    }
