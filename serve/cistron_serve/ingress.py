"""The routes: a thin FastAPI application over a ``Backend``.

A route checks the request at the door, asks the backend, and gives the answer its shape. Nothing here runs a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from cistron import __version__
from cistron.config import Config
from cistron_serve import admission, answers
from cistron_serve.backend import Backend, RayBackend
from cistron_serve.errors import install_handlers
from cistron_serve.metrics import RequestMetrics, RequestObserver
from cistron_serve.middleware import Guard
from cistron_serve.openapi import EVENT_STREAM, PROBLEMS, UNREADY, install_openapi
from cistron_serve.schemas import native
from cistron_serve.sse import events
from cistron_serve.worker import Call

_UNBUFFERED: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Asks caches and proxies to pass events on as they come."""


class IngressSettings(Config):
    """How to answer HTTP."""

    max_body_bytes: int = Field(default=4 << 20, ge=1024, le=1 << 30)
    """Longest request body."""
    max_inflight_requests: int = Field(default=512, ge=1, le=65_536)
    """Requests that one ingress replica has open, streams included; further ones are answered with 429."""
    num_replicas: int = Field(default=1, ge=1, le=1024)
    """Copies of the ingress."""
    num_cpus: float = Field(default=1.0, ge=0.0, le=64.0)
    """CPUs that Ray reserves for one copy."""


def create_api(backend: Backend, settings: IngressSettings, *, observe: RequestObserver) -> FastAPI:
    """Return the application that answers for the models behind `backend`."""
    app = FastAPI(title="Cistron", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(_information(backend))
    app.include_router(_operations(backend))
    install_handlers(app)
    install_openapi(app)
    app.add_middleware(
        Guard,
        max_body_bytes=settings.max_body_bytes,
        max_inflight_requests=settings.max_inflight_requests,
        observe=observe,
    )
    return app


@serve.ingress()
class Ingress:
    """The deployment that answers HTTP."""

    def __init__(self, models: Mapping[str, DeploymentHandle[Any]], settings: IngressSettings) -> None:
        self._backend = RayBackend(models)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Serve calls this in the replica, so it is never pickled."""
        return create_api(self._backend, self._settings, observe=RequestMetrics())


def _information(backend: Backend) -> APIRouter:
    """Return the routes that describe the service."""
    router = APIRouter(prefix="/v1")

    @router.get("/models", responses=UNREADY)
    async def list_models() -> native.ModelList:
        """List the served models with their limits."""
        return native.ModelList(data=await backend.cards())

    @router.get("/models/{model}", responses=PROBLEMS)
    async def get_model(model: native.ModelId) -> native.ModelCard:
        """Describe one served model."""
        return await backend.card(model)

    @router.get("/health/live")
    async def live() -> native.Health:
        """Answer while the service runs."""
        return native.Health(status="live")

    @router.get("/health/ready", responses=UNREADY)
    async def ready() -> native.Health:
        """Answer 200 when every model does, 503 before."""
        await backend.cards()
        return native.Health(status="ready")

    return router


def _operations(backend: Backend) -> APIRouter:
    """Return the routes that run a model."""
    router = APIRouter(prefix="/v1")

    @router.post("/score", responses=PROBLEMS)
    async def score(request: native.ScoreRequest) -> native.ScoreResponse:
        """Score sequences: log-likelihood of DNA, pseudo-log-likelihood of protein."""
        start = time.monotonic()
        card = await backend.card(request.model)
        call = Call.of("score", request.sequences, request.options(), tokens=admission.check_score(card, request))
        return answers.score_response(card, request, await backend.score(card.id, call), start=start)

    @router.post("/embed", responses=PROBLEMS)
    async def embed(request: native.EmbedRequest) -> native.EmbedResponse:
        """Embed sequences: representations of any layer, pooled or per token."""
        start = time.monotonic()
        card = await backend.card(request.model)
        call = Call.of("embed", request.sequences, request.options(), tokens=admission.check_embed(card, request))
        return answers.embed_response(card, request, await backend.embed(card.id, call), start=start)

    @router.post("/generate", response_model=native.GenerateResponse, responses=PROBLEMS | EVENT_STREAM)
    async def generate(request: native.GenerateRequest, http: Request) -> native.GenerateResponse | StreamingResponse:
        """Continue DNA prompts; with `stream`, answer piece by piece."""
        start = time.monotonic()
        card = await backend.card(request.model)
        prompt_tokens = admission.check_generate(card, request)
        if not request.stream:
            return answers.generate_response(card, request, await backend.generate(card.id, request), start=start)
        items = backend.stream(card.id, request)
        await anext(items)  # Admitted; a refusal still has its own status here.
        body = events(items, card, prompt_tokens=prompt_tokens, request_id=http.state.request_id)
        return StreamingResponse(body, media_type="text/event-stream", headers=_UNBUFFERED)

    return router
