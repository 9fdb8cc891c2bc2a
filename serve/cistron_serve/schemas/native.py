"""The native dialect: the field names are those of the Python functions.

Every integer, list and string has an upper bound here, so nothing unbounded is ever allocated. These bounds are
ceilings of the dialect; the limits of one model, which are lower, are in its card under ``GET /v1/models``.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, StringConstraints

from cistron_serve.limits import Limits

MODEL_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_LETTERS: Final = 1 << 20
"""Longest sequence of the dialect: Evo 2's longest context."""

ModelId = Annotated[str, StringConstraints(pattern=MODEL_PATTERN, max_length=64)]
Sequence = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LETTERS)]
Sequences = Annotated[list[Sequence], Field(min_length=1, max_length=1024)]
Window = Annotated[int, Field(ge=1, le=MAX_LETTERS)]
LayerName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
LayerIndex = Annotated[StrictInt, Field(ge=-1024, le=1023)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class Body(BaseModel):
    """Base of every body: an unknown field is an error, and a number is never read from a string."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Request(Body):
    """What every request names."""

    model: ModelId
    """Identifier of a served model; see ``GET /v1/models``."""


class ScoreRequest(Request):
    """Body of ``POST /v1/score``."""

    sequences: Sequences
    """DNA for Evo 2 (log-likelihood), protein for ESM-2 (pseudo-log-likelihood)."""
    reduction: Literal["mean", "sum", "none"] = "mean"
    """Over the scored tokens, natural logarithms; ``none`` returns the sum and every token's value."""
    reverse_complement: bool = False
    """DNA only: average the scores of both strands."""
    prepend_bos: bool = False
    """DNA only: put the beginning-of-sequence token first, so that the first nucleotide is scored too."""
    window: Window | None = None
    """Proteins only: residues around a masked one that the model sees; as many as it saw in training if null."""

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``cistron.score_sequences``."""
        return self.model_dump(exclude={"model", "sequences"})


class EmbedRequest(Request):
    """Body of ``POST /v1/embed``."""

    sequences: Sequences
    """DNA or protein, as the model reads."""
    layers: Annotated[list[LayerIndex | LayerName], Field(min_length=1, max_length=64)] = [-1]
    """``embedding``, ``blocks.0`` ..., ``final_norm``; integers index blocks, -1 is ``final_norm``."""
    pooling: Literal["mean", "cls", "last", "none"] = "mean"
    """``none`` returns one vector per token."""
    window: Window | None = None
    """Proteins only: residues that the model sees at once; longer ones are read in overlapping windows whose vectors
    are averaged. As many as it saw in training if null."""

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``cistron.embed_sequences``."""
        return {"layers": tuple(self.layers), "pooling": self.pooling, "window": self.window}


class GenerateRequest(Request):
    """Body of ``POST /v1/generate``."""

    prompts: Annotated[list[Sequence], Field(min_length=1, max_length=64)]
    """DNA to continue."""
    num_tokens: Annotated[int, Field(ge=1, le=MAX_LETTERS)]
    """Number of tokens to generate for each prompt."""
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Divides the logits; greedy decoding is ``top_k`` = 1."""
    top_k: Annotated[int, Field(ge=0, le=512)] = 4
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Keep the likeliest tokens whose probabilities reach p."""
    seed: Annotated[int, Field(ge=0, le=(1 << 63) - 1)] | None = None
    """Makes the answer reproducible."""
    allowed: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = "ACGT"
    """Letters that may be generated; null lifts the restriction."""
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] = []
    """Texts at which a generation ends."""
    stream: bool = False
    """Answer with server-sent events: ``chunk`` ..., then ``usage`` and ``done``, or ``error``."""

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``cistron.generate``."""
        return self.model_dump(exclude={"model", "prompts", "stream"})


class Usage(Body):
    """What an answer cost."""

    prompt_tokens: int
    generated_tokens: int = 0
    elapsed_ms: int


class Answer(Body):
    """What every answer states about the model behind it."""

    model: str
    system_fingerprint: str
    """Model, first digits of its sha256, number format and device: equal fingerprints give equal answers."""
    usage: Usage


class Score(Body):
    """Score of one sequence."""

    score: FiniteFloat | None
    """Null for the mean over no token, which has no value."""
    num_tokens: int
    per_token: list[FiniteFloat] | None


class ScoreResponse(Answer):
    """Answer of ``POST /v1/score``, in the order of the request."""

    scores: list[Score]


class Embedding(Body):
    """Representations of one sequence."""

    vectors: dict[str, list[FiniteFloat] | list[list[FiniteFloat]]]
    """By layer, spelt as in the request; one vector per nucleotide or residue when pooling is ``none``."""
    num_tokens: int


class EmbedResponse(Answer):
    """Answer of ``POST /v1/embed``, in the order of the request."""

    embeddings: list[Embedding]


class Generation(Body):
    """Continuation of one prompt, without the prompt."""

    text: str
    token_ids: list[int]
    logprobs: list[FiniteFloat]
    finish_reason: str


class GenerateResponse(Answer):
    """Answer of ``POST /v1/generate``, in the order of the request."""

    generations: list[Generation]


class ChunkEvent(Body):
    """Data of a ``chunk`` event: the next tokens of one generation."""

    index: int
    """Place of the prompt in the request."""
    offset: int
    """Number of this generation's tokens in earlier chunks."""
    text: str
    token_ids: list[int]
    logprobs: list[FiniteFloat]


class FinishedGeneration(Body):
    """How one generation of a stream ended."""

    index: int
    num_tokens: int
    finish_reason: str


class DoneEvent(Body):
    """Data of the ``done`` event, the last of a complete stream."""

    model: str
    system_fingerprint: str
    generations: list[FinishedGeneration]


class ModelCard(Body):
    """A served model, as ``GET /v1/models`` shows it."""

    id: str
    object: Literal["model"] = "model"
    family: Literal["evo2", "esm2"]
    sha256: str | None
    """Of the weights, from the checkpoint's manifest."""
    dtype: str
    """Number format of the weights, or of the products where that is another (int8, fp8)."""
    device: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    max_length: int
    """Longest sequence served, in nucleotides or residues."""
    trained_length: int
    """Longest sequence seen in training; longer proteins are read in windows of at most that many residues."""
    operations: list[Literal["generate", "score", "embed"]]
    limits: Limits

    @property
    def fingerprint(self) -> str:
        """Return what the answers call ``system_fingerprint``."""
        return "/".join([self.id, (self.sha256 or "unknown")[:12], self.dtype, self.device])


class ModelList(Body):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Body):
    """Answer of the health routes."""

    status: Literal["live", "ready"]


class Problem(Body):
    """The one shape of an error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    """Stable dotted name of the fault; programs branch on this."""
    param: str | None
    """Path of the field at fault, for example ``sequences[3]``."""
    request_id: str
