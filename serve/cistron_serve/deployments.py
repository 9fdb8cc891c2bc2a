"""One Serve deployment per model.

A replica loads a native checkpoint and runs it in one thread; its event loop only merges and splits requests, so health
checks and cancellation are never late. Score and embed calls that arrive together share batches of a token budget;
generations run one request at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import ray
import torch
from pydantic import BeforeValidator, Field
from ray import serve
from ray.serve.config import BackpressureConfig

from cistron.config import Config
from cistron.errors import CheckpointError
from cistron.inference.batching import TOKEN_BUDGET
from cistron.inference.generate import Generation, generate
from cistron.models.base import SequenceModel
from cistron.models.families import build, config_of
from cistron.models.layers.linear import reorder_weights
from cistron.models.manifest import read_manifest
from cistron.models.registry import Precision, load_model
from cistron_serve.limits import Limits
from cistron_serve.metrics import ModelMetrics
from cistron_serve.schemas.native import GenerateRequest, ModelCard
from cistron_serve.streaming import Chunk, TokenStream
from cistron_serve.worker import BATCH_SLOTS, Call, Result, Slotted, Worker, run_calls, total_slots

logger = logging.getLogger(__name__)

_OPERATIONS: Final[dict[str, list[Literal["generate", "score", "embed"]]]] = {
    "evo2": ["generate", "score", "embed"],
    "esm2": ["score", "embed"],
}

_LOAD_ATTEMPTS: Final = 3
"""A checkpoint that cannot be read does not get better; three attempts allow for a node that just went away."""


class ModelSettings(Config):
    """How to serve one model."""

    source: str = Field(min_length=1)
    """Native checkpoint folder, or a registry name whose weights are on disk."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU when the running cluster has one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of the weights; None keeps the stored one."""
    precision: Precision = "auto"
    """``auto`` takes the path known to be good for the model here, or refuses; any other is taken as named. In fp32 on
    a CPU a replica holds linear layers of up to 1 GiB twice, once in the order in which they are multiplied."""
    num_replicas: int = Field(default=1, ge=1, le=1024)
    """Copies of the model."""
    num_cpus: float = Field(default=1.0, ge=0.0, le=1024.0)
    """CPUs that Ray reserves for one replica."""
    max_length: int | None = Field(default=None, ge=1, le=1 << 20)
    """Longest sequence served. None means the context of Evo 2, and of ESM-2, which reads long proteins in windows,
    as much as one request may hold (`limits.max_tokens`)."""
    max_batch_tokens: int = Field(default=TOKEN_BUDGET, ge=1, le=1 << 24)
    """Token budget of one batch, and of one forward pass."""
    batch_wait_timeout_s: float = Field(default=0.01, ge=0.0, le=10.0)
    """How long the first call of a batch waits for others."""
    max_ongoing_requests: int = Field(default=2 * BATCH_SLOTS, ge=1, le=4096)
    """Requests that one replica holds."""
    max_queued_requests: int = Field(default=128, ge=1, le=65_536)
    """Requests that wait for a replica; further ones are answered with 429."""
    limits: Limits = Limits()
    """Most that one request may ask."""


def _from_source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


ModelEntry = Annotated[ModelSettings, BeforeValidator(_from_source)]
"""Settings of a model, or just its source."""


class ModelServer:
    """A replica of one model."""

    def __init__(self, model_id: str, settings: ModelSettings) -> None:
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        device = resolve_device(settings.device)
        self._model = load_model(settings.source, device=device, dtype=dtype, precision=settings.precision)
        reorder_weights(self._model)
        self._card = describe(model_id, self._model, settings)
        self._settings = settings
        self._metrics = ModelMetrics(model_id)
        self._worker = Worker(on_wait=self._metrics.waited)
        self._batch.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)  # type: ignore[attr-defined]  # serve.batch
        logger.info("serving %s", self._card.fingerprint)

    async def describe(self) -> ModelCard:
        """Return the model's card; answers as soon as the weights are in memory."""
        return self._card

    async def call(self, call: Call) -> list[Result]:
        """Answer a score or embed request, in a batch with others."""
        outcome = await self._batch(Slotted.of(call, token_budget=self._settings.max_batch_tokens))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """Answer a generate request at once."""
        stream = TokenStream(len(request.prompts))
        try:
            return await self._worker.run(partial(self._generate, request, stream))
        finally:
            stream.cancel()

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk | list[Generation] | None]:
        """Answer a generate request piece by piece: None once it is admitted, chunks, then the generations.

        Further Nones are signs of life.
        """
        stream = TokenStream(len(request.prompts))
        job = asyncio.ensure_future(self._worker.run(partial(self._generate, request, stream)))
        try:
            yield None
            async for chunk in stream.chunks():
                yield chunk
            yield await job
        finally:
            stream.cancel()
            job.cancel()

    @serve.batch(max_batch_size=BATCH_SLOTS, batch_size_fn=total_slots)
    async def _batch(self, batch: list[Slotted]) -> list[list[Result] | Exception]:
        """Run the calls that arrived together."""
        calls = [item.call for item in batch]
        start = time.monotonic()
        run = partial(run_calls, self._model, calls, token_budget=self._settings.max_batch_tokens)
        outcomes: list[list[Result] | Exception] = await self._worker.run(run)
        self._metrics.batch(
            fill=total_slots(batch) / BATCH_SLOTS,
            tokens=sum(call.tokens for call in calls),
            seconds=time.monotonic() - start,
        )
        return outcomes

    def _generate(self, request: GenerateRequest, stream: TokenStream) -> list[Generation]:
        """Generate in the model's thread; every token passes through `stream`, which may cancel."""
        start, count = time.monotonic(), 0

        def on_token(index: int, token_id: int, logprob: float) -> None:
            nonlocal count
            count += 1
            stream.push(index, token_id, logprob)

        try:
            stream.check()
            return generate(self._model, request.prompts, **request.options(), on_token=on_token)
        finally:
            stream.finish()
            self._metrics.generated(count, seconds=time.monotonic() - start)


def deployment(model_id: str, settings: ModelSettings) -> serve.Application:
    """Return the bound deployment of one model."""
    device = resolve_device(settings.device)
    actor_options = {"num_cpus": settings.num_cpus, "num_gpus": 1 if device == "cuda" else 0}
    options = serve.deployment(
        name=f"model-{model_id}",
        num_replicas=settings.num_replicas,
        ray_actor_options=actor_options,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_constructor_retry_count=_LOAD_ATTEMPTS,
    )
    where = {"device": device, "source": _absolute(settings.source)}
    return options(ModelServer).bind(model_id, settings.model_copy(update=where))


def _absolute(source: str) -> str:
    """Return a local folder's absolute path, because a replica may run in another working directory."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return where a model goes: ``auto`` is a GPU when the running Ray cluster has one."""
    if device != "auto":
        return device
    resources: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    has_gpu = resources.get("GPU", 0) > 0
    return "cuda" if has_gpu else "cpu"


def describe(model_id: str, model: SequenceModel, settings: ModelSettings) -> ModelCard:
    """Return the card of a loaded model."""
    return ModelCard(
        id=model_id,
        family=model.family,
        sha256=weights_sha256(settings.source),
        dtype=_number_format(model),
        device=str(model.device),
        num_parameters=build(config_of(model), device="meta").num_parameters(),
        num_layers=len(model.blocks),
        hidden_size=config_of(model).hidden_size,
        max_length=_max_length(model, settings),
        trained_length=config_of(model).max_length,
        operations=_OPERATIONS[model.family],
        limits=settings.limits,
    )


def _number_format(model: SequenceModel) -> str:
    """Return the dtype of the weights, or the path that the products take where that is another."""
    rounded = model.precision_path.startswith(("fp8", "int8"))
    return model.precision_path if rounded else str(next(model.parameters()).dtype).removeprefix("torch.")


def _max_length(model: SequenceModel, settings: ModelSettings) -> int:
    """Return the longest sequence served; Evo 2's context is a hard limit, ESM-2's trained length is not."""
    if model.family == "esm2":
        return settings.max_length or settings.limits.max_tokens
    own = config_of(model).max_length
    return min(settings.max_length or own, own)


def weights_sha256(source: str) -> str | None:
    """Return the sha256 of a checkpoint's weights as its manifest says; with shards, that of their sha256s."""
    try:
        files = read_manifest(Path(source))["files"]
    except CheckpointError:
        return None
    digests = [entry["sha256"] for name, entry in sorted(files.items()) if name.endswith(".safetensors")]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
