"""The checks at the door: may this model answer this request?

Plain functions of a model's card and a request. They run in the ingress, so what cannot be answered never reaches a
replica, and the error names the field, the index and the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from cistron.alphabets import MASK, TAG_DELIMITER
from cistron.errors import InputError, SequenceError, UnknownNameError
from cistron.inference.protein_windows import num_windows
from cistron.inference.sampling import letter_ids
from cistron.models.naming import canonical_layer
from cistron.tokenizers import TOKENIZERS
from cistron_serve.errors import ApiError, from_library
from cistron_serve.schemas.native import EmbedRequest, GenerateRequest, ModelCard, ScoreRequest

_SPLIT: Final = "split it into several requests"


def check_score(card: ModelCard, request: ScoreRequest) -> int:
    """Return the tokens that the request runs through the model.

    Raises:
        ApiError: the model cannot answer it, or it is above a limit.
    """
    _check_operation(card, "score")
    for option in ("reverse_complement", "prepend_bos"):
        if card.family != "evo2" and getattr(request, option):
            raise _wrong_family(card, f"{option} applies to DNA models", param=option)
    if request.reverse_complement and request.reduction == "none":
        detail = "reverse_complement averages two strands, whose tokens are at different places: use mean or sum"
        raise ApiError(422, "request.invalid", detail, param="reverse_complement")
    lengths = _check_sequences(card, request.sequences, field="sequences", most=card.limits.max_sequences)
    if card.family == "esm2":
        _check_absent(request.sequences, MASK, "has no residue to score")
    elif request.reverse_complement:
        _check_absent(request.sequences, TAG_DELIMITER, "begins a tag, which has no reverse complement")
    passes, size = 2 if request.reverse_complement else 1, _window(card, request.window)
    forward = sum(length * (min(length, size) + 2) if card.family == "esm2" else length * passes for length in lengths)
    smaller = "ask for a smaller window" if card.family == "esm2" else "ask for one strand"
    _check_forward(card, forward, lengths, alone=smaller)
    return forward


def check_embed(card: ModelCard, request: EmbedRequest) -> int:
    """Return the tokens that the request runs through the model.

    Raises:
        ApiError: the model cannot answer it, or it is above a limit.
    """
    _check_operation(card, "embed")
    for index, layer in enumerate(request.layers):
        try:
            canonical_layer(layer, num_layers=card.num_layers)
        except UnknownNameError as error:
            raise ApiError(422, "layer.not_found", str(error), param=f"layers[{index}]") from error
    if request.pooling == "cls" and card.family != "esm2":
        raise _wrong_family(card, "pooling 'cls' applies to protein models", param="pooling")
    size = _window(card, request.window)
    lengths = _check_sequences(card, request.sequences, field="sequences", most=card.limits.max_sequences)
    rows = sum(lengths) if request.pooling == "none" else len(lengths)
    values = rows * len(request.layers) * card.hidden_size
    _check_total(values, card.limits.max_response_values, "numbers in the answer", "max_response_values")
    if card.family != "esm2":
        return sum(lengths)
    forward = sum(num_windows(length, window=size) * (min(length, size) + 2) for length in lengths)
    # Every residue is in two windows; of larger ones there are fewer, each with two tokens of its own.
    _check_forward(card, forward, lengths, alone="ask for a larger window")
    return forward


def check_generate(card: ModelCard, request: GenerateRequest) -> int:
    """Return the letters of the prompts.

    Raises:
        ApiError: the model cannot answer it, or it is above a limit.
    """
    _check_operation(card, "generate")
    try:
        letter_ids(request.allowed)
    except InputError as error:
        raise from_library(error, param="allowed") from error
    limits = card.limits
    lengths = _check_sequences(card, request.prompts, field="prompts", most=limits.max_prompts)
    name = "max_num_tokens_stream" if request.stream else "max_num_tokens"
    most = min(getattr(limits, name), card.max_length - max(lengths))
    if request.num_tokens > most:
        reason = f"at most {most:,} tokens fit here ({name} {getattr(limits, name):,}, context {card.max_length:,})"
        raise ApiError(422, "request.limit_exceeded", f"num_tokens: {reason}", param="num_tokens")
    if not request.stream:
        _check_total(sum(lengths) + len(lengths) * request.num_tokens, limits.max_tokens, "letters", "max_tokens")
    return sum(lengths)


def _window(card: ModelCard, asked: int | None) -> int:
    """Return the residues of a protein that the model sees at once.

    Raises:
        ApiError: the model does not read proteins, or would read more than it was trained on, which costs their square.
    """
    if asked is not None and card.family != "esm2":
        raise _wrong_family(card, "window applies to protein models", param="window")
    if asked is not None and asked > card.trained_length:
        detail = f"window: {asked:,} is more than the {card.trained_length:,} residues that {card.id} was trained on"
        raise ApiError(422, "request.limit_exceeded", detail, param="window")
    return asked or card.trained_length


def _check_operation(card: ModelCard, operation: Literal["score", "embed", "generate"]) -> None:
    if operation not in card.operations:
        raise _wrong_family(card, f"it cannot {operation} (it can: {', '.join(card.operations)})", param="model")


def _check_sequences(card: ModelCard, sequences: Sequence[str], *, field: str, most: int) -> list[int]:
    """Return the lengths of the sequences in letters."""
    if len(sequences) > most:
        detail = f"{field}: {len(sequences):,} is more than the limit of {most:,}; {_SPLIT}"
        raise ApiError(422, "request.limit_exceeded", detail, param=field)
    tokenizer, lengths = TOKENIZERS[card.family], []
    for index, sequence in enumerate(sequences):
        name = f"{field}[{index}]"
        length = tokenizer.num_letters(sequence)
        if length > card.max_length:
            detail = f"{name}: {length:,} letters are more than the {card.max_length:,} that {card.id} reads"
            raise ApiError(422, "sequence.too_long", detail, param=name)
        try:
            tokenizer.validate(sequence, name=name)
        except SequenceError as error:
            raise from_library(error, param=name) from error
        lengths.append(length)
    _check_total(sum(lengths), card.limits.max_tokens, "letters", "max_tokens")
    return lengths


def _check_absent(sequences: Sequence[str], text: str, reason: str) -> None:
    for index, sequence in enumerate(sequences):
        if text in sequence:
            detail = f"sequences[{index}]: {text} at position {sequence.index(text) + 1} {reason}"
            raise ApiError(422, "sequence.invalid", detail, param=f"sequences[{index}]")


def _check_forward(card: ModelCard, tokens: int, lengths: Sequence[int], *, alone: str) -> None:
    """Refuse more tokens through the model than are allowed; `alone` is the remedy where nothing can be split."""
    remedy, most = alone if len(lengths) == 1 else _SPLIT, card.limits.max_forward_tokens
    _check_total(tokens, most, "tokens through the model", "max_forward_tokens", remedy=remedy)


def _check_total(got: int, most: int, what: str, limit: str, *, remedy: str = _SPLIT) -> None:
    if got > most:
        raise ApiError(413, "request.too_large", f"{got:,} {what} are more than {limit} = {most:,}; {remedy}")


def _wrong_family(card: ModelCard, reason: str, *, param: str) -> ApiError:
    return ApiError(
        422, "model.wrong_family", f"{card.id} is a model of the {card.family} family: {reason}", param=param
    )
