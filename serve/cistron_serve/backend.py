"""What the routes need of the models, and how Ray Serve gives it.

The ``Backend`` protocol is the seam between HTTP and Ray: routes are tested without a cluster against a stand-in, and
everything that Ray can raise becomes an ``ApiError`` here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final, Protocol, cast

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cistron.errors import CistronError, nearest
from cistron.inference.embed import Embedding
from cistron.inference.generate import Generation
from cistron.inference.score import SequenceScore
from cistron_serve.errors import ApiError, from_library, retry_later
from cistron_serve.schemas.native import GenerateRequest, ModelCard
from cistron_serve.streaming import Chunk
from cistron_serve.worker import Call

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S: Final = 5.0
"""A replica that holds its weights answers for its card at once; one that loads them lets the call wait."""


class Backend(Protocol):
    """The models behind the routes."""

    async def card(self, model_id: str) -> ModelCard:
        """Return a model's card; raise ``ApiError`` for an unknown or unready model."""
        ...

    async def cards(self) -> list[ModelCard]:
        """Ask every model for its card; raise ``ApiError`` unless all answer."""
        ...

    async def score(self, model_id: str, call: Call) -> list[SequenceScore]:
        """Answer a score request."""
        ...

    async def embed(self, model_id: str, call: Call) -> list[Embedding]:
        """Answer an embed request."""
        ...

    async def generate(self, model_id: str, request: GenerateRequest) -> list[Generation]:
        """Answer a generate request at once."""
        ...

    def stream(self, model_id: str, request: GenerateRequest) -> AsyncIterator[Chunk | list[Generation] | None]:
        """Yield None when the request is admitted, then chunks, then the generations."""
        ...


class RayBackend:
    """Models as deployments of one Serve application."""

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._handles = dict(handles)
        self._cards: dict[str, ModelCard] = {}

    async def card(self, model_id: str) -> ModelCard:
        """Return a model's card, which is asked for once."""
        if model_id not in self._handles:
            raise unknown_model(model_id, list(self._handles))
        return self._cards.get(model_id) or await self._describe(model_id)

    async def cards(self) -> list[ModelCard]:
        """Ask every model for its card, side by side."""
        return list(await asyncio.gather(*(self._describe(model_id) for model_id in self._handles)))

    async def score(self, model_id: str, call: Call) -> list[SequenceScore]:
        """Answer a score request."""
        scores: list[SequenceScore] = await self._await(model_id, self._handles[model_id].call.remote(call))
        return scores

    async def embed(self, model_id: str, call: Call) -> list[Embedding]:
        """Answer an embed request."""
        embeddings: list[Embedding] = await self._await(model_id, self._handles[model_id].call.remote(call))
        return embeddings

    async def generate(self, model_id: str, request: GenerateRequest) -> list[Generation]:
        """Answer a generate request at once."""
        generations: list[Generation] = await self._await(model_id, self._handles[model_id].generate.remote(request))
        return generations

    async def stream(self, model_id: str, request: GenerateRequest) -> AsyncIterator[Chunk | list[Generation] | None]:
        """Yield a generation piece by piece; closing this iterator ends the generation."""
        handle = self._handles[model_id].options(stream=True)
        response = cast(DeploymentResponseGenerator[Any], handle.stream.remote(request))
        try:
            with translated(model_id):
                async for item in response:
                    yield item
        finally:
            response.cancel()  # type: ignore[no-untyped-call]

    async def _describe(self, model_id: str) -> ModelCard:
        try:
            response = self._handles[model_id].describe.remote()
            card: ModelCard = await asyncio.wait_for(self._await(model_id, response), _READY_TIMEOUT_S)
        except TimeoutError as error:
            raise not_ready(model_id) from error
        except ApiError as error:
            if error.status == HTTPStatus.TOO_MANY_REQUESTS and model_id in self._cards:
                return self._cards[model_id]  # Busy, hence alive.
            raise
        self._cards[model_id] = card
        return card

    async def _await(self, model_id: str, response: Any) -> Any:
        """Return the response's value; a cancelled request cancels the call behind it."""
        try:
            with translated(model_id):
                return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


@contextmanager
def translated(model_id: str) -> Iterator[None]:
    """Turn what Ray raises about a call into ``ApiError``."""
    try:
        yield
    except BackPressureError as error:
        detail = f"{model_id} has as many requests waiting as it accepts"
        raise retry_later(429, "server.overloaded", detail, retry_after_s=error.retry_after_s or 1.0) from error
    except RayTaskError as error:
        if isinstance(error.cause, CistronError):
            raise from_library(error.cause) from error
        raise
    except (DeploymentUnavailableError, RayActorError) as error:
        raise not_ready(model_id) from error


def not_ready(model_id: str) -> ApiError:
    """Return the 503 of a model that does not answer."""
    return retry_later(503, "server.not_ready", f"{model_id} is not ready", retry_after_s=5)


def unknown_model(model_id: str, known: list[str]) -> ApiError:
    """Return the 404 of a model that is not served."""
    detail = f"unknown model {model_id!r}{nearest(model_id, known)} (served: {', '.join(known)})"
    return ApiError(404, "model.not_found", detail, param="model")
