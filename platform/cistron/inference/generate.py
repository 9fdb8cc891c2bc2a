"""Continue DNA prompts with Evo 2, token by token, from its constant-size state.

Prompts of any lengths share a batch: each row's state is that after its own last nucleotide, and each prompt draws
from its own random stream, so a continuation does not depend on its neighbours. A row that has ended leaves the batch.
Long prompts enter in chunks, which bounds the memory of reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import torch

from cistron.errors import CapabilityError, InputError
from cistron.inference.batching import checked_sequences
from cistron.inference.generation_request import check_counts, check_room, parsed_stops
from cistron.inference.prefill import Prompt, prefill
from cistron.inference.sampling import Sampling, UniformStream, generators, letter_ids, sample
from cistron.models.base import SequenceModel
from cistron.models.evo2.model import Evo2
from cistron.models.layers.linear import reordered_weights
from cistron.tokenizers import ByteTokenizer

FinishReason: TypeAlias = Literal["length", "stop"]
OnToken: TypeAlias = Callable[[int, int, float], None]
"""Called with the prompt's index, the token's id and its log-probability, in the order of generation."""

PREFILL_CHUNK: Final = 8192
_MAX_ROWS: Final = 32
"""Prompts generated together; more wait, so that a long list does not need memory for all its states at once."""

_WORTH_REORDERING: Final = 16
"""Steps that repay reordering the weights, which costs about three."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Continuation of one prompt.

    Attributes:
        text: the generated letters, a matched stop string included.
        token_ids: their ids.
        logprobs: each token's log-probability under the unmodified distribution: before the alphabet's mask,
            temperature, top-k and top-p.
        finish_reason: ``stop`` when a stop was generated, else ``length``.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


@torch.inference_mode()
def generate(
    model: SequenceModel,
    prompts: Iterable[str],
    *,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int = 4,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    allowed: str | None = "ACGT",
    stop: str | Iterable[str | int] = (),
    on_token: OnToken | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    extend_context: bool = False,
) -> list[Generation]:
    """Continue each prompt by `num_tokens` tokens; results come in the order of the prompts.

    Args:
        model: an Evo 2.
        prompts: DNA, which may hold lower case and phylogenetic tags.
        num_tokens: tokens per prompt; fewer when a stop string comes first.
        temperature: divides the logits; above 0.
        top_k: choose among the k most likely tokens; 1 is greedy, 0 means all.
        top_p: choose among the most likely tokens that together reach this probability, after temperature and top_k; 1
            means all.
        seed: one seed, with which a prompt's continuation does not depend on the other prompts (repeats of a prompt
            differ); or one seed per prompt; or None for other results each time.
        allowed: the letters that may be generated; None allows all 512 tokens.
        stop: strings, or token ids, that end a continuation. Ids 0 and 1 end it only when they are among them.
        on_token: called for every token as it is made; what it raises ends the generation.
        prefill_chunk: most nucleotides of prompts, all rows together, that enter the model at once; it bounds memory
            and changes nothing else.
        extend_context: let a prompt and its continuation be longer than the model was trained for. Nothing is dropped,
            but how good predictions are beyond that length is unknown.

    Raises:
        InputError: the request is empty, the model does not generate, or a setting is out of range.
        SequenceError: a prompt the model cannot read, or that leaves no room for `num_tokens` unless `extend_context`.
        CapabilityError: the model returned NaN or infinity.
    """
    if not isinstance(model, Evo2):
        raise InputError(f"{model.family} does not generate: it is trained to fill masks; use an Evo 2 model")
    sampling = Sampling(temperature, top_k, top_p, letter_ids(allowed)).validated(vocab_size=model.config.vocab_size)
    check_counts(num_tokens, prefill_chunk)
    checked = checked_sequences(model, prompts, what="prompt", limited=False)
    check_room(checked, num_tokens, model.config.max_length, extend_context=extend_context)
    stops, stop_ids = parsed_stops(stop, allowed=allowed, vocab_size=model.config.vocab_size)
    drafts = [
        _Draft(index, model.tokenizer.encode(prompt), UniformStream(generator), stops, stop_ids)
        for index, (prompt, generator) in enumerate(zip(checked, generators(checked, seed), strict=True))
    ]
    with reordered_weights(model) if num_tokens >= _WORTH_REORDERING else nullcontext():
        for batch in _batches(drafts):
            for draft in _decoded(model, batch, num_tokens, sampling, prefill_chunk):
                if on_token is not None:
                    on_token(draft.index, draft.token_ids[-1], draft.logprobs[-1])
    return [draft.finished() for draft in drafts]


@dataclass(slots=True)
class _Draft:
    """A continuation in the making."""

    index: int
    prompt: Prompt
    stream: UniformStream
    stops: tuple[str, ...]
    stop_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tail: str = ""
    stopped: bool = False

    def append(self, token_id: int, logprob: float) -> None:
        """Add a token and see whether it is a stop or completes one."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.stopped = token_id in self.stop_ids
        if self.stops:
            self.tail = (self.tail + ByteTokenizer().decode([token_id]))[-max(map(len, self.stops)) :]
            self.stopped |= self.tail.endswith(self.stops)

    def finished(self) -> Generation:
        """Return the result."""
        text = ByteTokenizer().decode(self.token_ids)
        return Generation(text, self.token_ids, self.logprobs, "stop" if self.stopped else "length")


def _decoded(
    model: Evo2, drafts: Sequence[_Draft], num_tokens: int, sampling: Sampling, prefill_chunk: int
) -> Iterator[_Draft]:
    """Extend the drafts of one batch; yield each draft each time it has grown by a token."""
    if num_tokens == 0:
        return
    cache, logits = prefill(model, [draft.prompt for draft in drafts], chunk=prefill_chunk, room=num_tokens)
    for step in range(num_tokens):
        tokens, logprobs = _chosen(logits, drafts, sampling)
        for draft, token, logprob in zip(drafts, tokens.tolist(), logprobs, strict=True):
            draft.append(token, logprob)
            yield draft
        going = [row for row, draft in enumerate(drafts) if not draft.stopped]
        if step + 1 == num_tokens or not going:
            return
        if len(going) < len(drafts):
            cache, tokens, drafts = cache.select(going), tokens[going], [drafts[row] for row in going]
        logits = model(tokens[:, None].to(model.device), cache=cache).logits[:, -1]


def _chosen(logits: torch.Tensor, drafts: Sequence[_Draft], sampling: Sampling) -> tuple[torch.Tensor, list[float]]:
    """Return each row's next token, int64 [B] on the CPU, and its log-probability among all tokens."""
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise CapabilityError(
            "the model returned NaN or infinity: this precision does not suit its weights; try precision=fp32"
        )
    uniforms = torch.tensor([draft.stream.next() for draft in drafts], dtype=torch.float64)
    tokens = sample(logits, uniforms, sampling)
    return tokens, logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].tolist()


def _batches(drafts: Sequence[_Draft]) -> Iterator[list[_Draft]]:
    """Yield groups of drafts whose prompts are about equally long."""
    order = sorted(drafts, key=lambda draft: len(draft.prompt))
    for start in range(0, len(order), _MAX_ROWS):
        yield order[start : start + _MAX_ROWS]
