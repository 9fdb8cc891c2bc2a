"""From the library's results to the bodies of answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypedDict

from cistron.inference.embed import Embedding
from cistron.inference.generate import Generation
from cistron.inference.score import SequenceScore
from cistron.tokenizers import TOKENIZERS
from cistron_serve.schemas import native


class _Stated(TypedDict):
    model: str
    system_fingerprint: str
    usage: native.Usage


def score_response(
    card: native.ModelCard, request: native.ScoreRequest, results: Sequence[SequenceScore], *, start: float
) -> native.ScoreResponse:
    """Return the answer to a score request; `start` is a monotonic time in seconds."""
    return native.ScoreResponse(
        scores=[_score(result) for result in results], **_stated(card, request.sequences, start)
    )


def embed_response(
    card: native.ModelCard, request: native.EmbedRequest, results: Sequence[Embedding], *, start: float
) -> native.EmbedResponse:
    """Return the answer to an embed request."""
    embeddings = [_embedding(result) for result in results]
    return native.EmbedResponse(embeddings=embeddings, **_stated(card, request.sequences, start))


def generate_response(
    card: native.ModelCard, request: native.GenerateRequest, results: Sequence[Generation], *, start: float
) -> native.GenerateResponse:
    """Return the answer to a generate request that does not stream."""
    generated = sum(len(result.token_ids) for result in results)
    generations = [_generation(result) for result in results]
    return native.GenerateResponse(
        generations=generations, **_stated(card, request.prompts, start, generated=generated)
    )


def _score(result: SequenceScore) -> native.Score:
    per_token = None if result.per_token is None else result.per_token.tolist()
    has_value = result.num_tokens > 0 or result.score == 0.0
    return native.Score(score=result.score if has_value else None, num_tokens=result.num_tokens, per_token=per_token)


def _embedding(result: Embedding) -> native.Embedding:
    vectors = {str(layer): vector.tolist() for layer, vector in result.vectors.items()}
    return native.Embedding(vectors=vectors, num_tokens=result.num_tokens)


def _generation(result: Generation) -> native.Generation:
    return native.Generation(
        text=result.text,
        token_ids=result.token_ids,
        logprobs=result.logprobs,
        finish_reason=result.finish_reason,
    )


def _stated(card: native.ModelCard, inputs: Sequence[str], start: float, *, generated: int = 0) -> _Stated:
    """Return what every answer states."""
    usage = native.Usage(
        prompt_tokens=sum(map(TOKENIZERS[card.family].num_letters, inputs)),
        generated_tokens=generated,
        elapsed_ms=round(1000 * (time.monotonic() - start)),
    )
    return {"model": card.id, "system_fingerprint": card.fingerprint, "usage": usage}
