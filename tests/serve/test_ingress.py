"""Routes against a stand-in for the models: the shapes of errors, the guard and the events, without a cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from cistron.inference.embed import Embedding
from cistron.inference.generate import Generation
from cistron.inference.score import SequenceScore
from cistron_serve.backend import unknown_model
from cistron_serve.errors import ApiError, retry_later
from cistron_serve.ingress import IngressSettings, create_api
from cistron_serve.limits import Limits
from cistron_serve.schemas import native
from cistron_serve.streaming import Chunk
from cistron_serve.worker import Call

CARD = native.ModelCard(
    id="dna",
    family="evo2",
    sha256="ab" * 32,
    dtype="float32",
    device="cpu",
    num_parameters=10,
    num_layers=4,
    hidden_size=2,
    max_length=100,
    trained_length=100,
    operations=["generate", "score", "embed"],
    limits=Limits(),
)
SCORE = {"model": "dna", "sequences": ["ACGT"]}
STREAM = {"model": "dna", "prompts": ["ACGT"], "num_tokens": 2, "stream": True}
JSON = {"content-type": "application/json"}
GZIP = JSON | {"content-encoding": "gzip"}


class StandIn:
    """Answers with fixed values, or raises `failure`."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.release = asyncio.Event()
        self.release.set()
        self.calls: list[Call] = []
        self.streams_closed = 0

    async def card(self, model_id: str) -> native.ModelCard:
        if model_id != "dna":
            raise unknown_model(model_id, ["dna"])
        return CARD

    async def cards(self) -> list[native.ModelCard]:
        self._fail()
        return [CARD]

    async def score(self, model_id: str, call: Call) -> list[SequenceScore]:
        self._fail()
        self.calls.append(call)
        await self.release.wait()
        return [SequenceScore(float("nan") if len(s) == 1 else -1.5, len(s) - 1) for s in call.sequences]

    async def embed(self, model_id: str, call: Call) -> list[Embedding]:
        return [Embedding({-1: np.array([float("inf"), 1.0], dtype=np.float32)}, 4)]

    async def generate(self, model_id: str, request: native.GenerateRequest) -> list[Generation]:
        return [Generation("AC", [65, 67], [-1.0, -2.0], "length") for _ in request.prompts]

    async def stream(
        self, model_id: str, request: native.GenerateRequest
    ) -> AsyncIterator[Chunk | list[Generation] | None]:
        try:
            if request.num_tokens == 1:
                raise retry_later(429, "server.overloaded", "full")
            yield None
            yield Chunk(0, 0, [65], [-1.0])
            yield None
            self._fail()
            yield Chunk(0, 1, [67], [-2.0])
            yield [Generation("AC", [65, 67], [-1.0, -2.0], "stop")]
        finally:
            self.streams_closed += 1

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


def client_of(backend: StandIn, *, observed: list[dict[str, Any]] | None = None, **settings: Any) -> httpx.AsyncClient:
    def observe(**values: Any) -> None:
        if observed is not None:
            observed.append(values)

    app = create_api(backend, IngressSettings(**settings), observe=observe)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


async def exchange(method: str, path: str, *, backend: StandIn | None = None, **request: Any) -> httpx.Response:
    async with client_of(backend or StandIn(), max_body_bytes=1024) as client:
        return await client.request(method, path, **request)


def ask(method: str, path: str, *, backend: StandIn | None = None, **request: Any) -> httpx.Response:
    return asyncio.run(exchange(method, path, backend=backend, **request))


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert list(body) == ["type", "title", "status", "detail", "code", "param", "request_id"]
    assert (body["status"], body["code"], body["type"]) == (status, code, f"urn:cistron:error:{code}")
    assert body["title"]
    assert body["detail"]
    assert body["request_id"]
    return body


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "route.not_found"),
        ("POST", "/v1/nothing", {"json": {}}, 404, "route.not_found"),
        ("GET", "/v1/score", {}, 405, "route.method_not_allowed"),
        ("DELETE", "/v1/models", {}, 405, "route.method_not_allowed"),
        ("POST", "/v1/score", {"content": b"{", "headers": JSON}, 400, "request.malformed_json"),
        ("POST", "/v1/score", {"content": b"", "headers": JSON}, 422, "request.invalid"),
        ("POST", "/v1/score", {"content": b"[]", "headers": JSON}, 422, "request.invalid"),
        ("POST", "/v1/score", {"content": b"\xff\xfe{}", "headers": JSON}, 400, "request.malformed_json"),
        ("POST", "/v1/score", {"content": b'{"model": NaN}', "headers": JSON}, 422, "request.invalid"),
        ("POST", "/v1/score", {"data": {"model": "dna"}}, 415, "request.unsupported_media_type"),
        ("POST", "/v1/score", {"content": b"{}"}, 415, "request.unsupported_media_type"),
        ("POST", "/v1/score", {"content": b"x", "headers": GZIP}, 415, "request.unsupported_encoding"),
        ("POST", "/v1/score", {"content": b" " * 1025, "headers": JSON}, 413, "request.too_large"),
        ("POST", "/v1/score", {"json": SCORE | {"model": "dnaa"}}, 404, "model.not_found"),
        ("GET", "/v1/models/dnaa", {}, 404, "model.not_found"),
        ("POST", "/v1/generate", {"json": STREAM | {"num_tokens": 1}}, 429, "server.overloaded"),
        ("POST", "/v1/embed", {"json": SCORE}, 500, "server.internal"),
    ],
)  # fmt: skip
def test_errors_have_one_shape(method: str, path: str, request_: dict[str, Any], status: int, code: str) -> None:
    assert_problem(ask(method, path, **request_), status, code)


def test_an_error_carries_the_headers_and_the_request_id() -> None:
    response = ask("GET", "/v1/score", headers={"x-request-id": "abc-1"})
    assert response.headers["allow"] == "POST"
    assert assert_problem(response, 405, "route.method_not_allowed")["request_id"] == "abc-1"
    forged = ask("GET", "/v1/score", headers={"x-request-id": "a b\t%0a"})
    assert forged.json()["request_id"] not in {"", "a b\t%0a"}
    assert ask("GET", "/v1/nothing").json()["request_id"] != ask("GET", "/v1/nothing").json()["request_id"]


def test_an_unknown_model_gets_the_nearest_name() -> None:
    body = assert_problem(ask("POST", "/v1/score", json=SCORE | {"model": "dnaa"}), 404, "model.not_found")
    assert "did you mean 'dna'" in body["detail"]
    assert body["param"] == "model"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (retry_later(429, "server.overloaded", "full", retry_after_s=1.2), 429, "server.overloaded"),
        (retry_later(503, "server.not_ready", "loading"), 503, "server.not_ready"),
        (ApiError(422, "sequence.invalid", "bad letter", param="sequences[0]"), 422, "sequence.invalid"),
        (RuntimeError("sequence GATTACA broke"), 500, "server.internal"),
    ],
)
def test_failures_of_the_models_are_answered(failure: Exception, status: int, code: str) -> None:
    response = ask("POST", "/v1/score", backend=StandIn(failure), json=SCORE)
    body = assert_problem(response, status, code)
    assert "GATTACA" not in json.dumps(body)
    assert response.headers.get("retry-after") == {429: "2", 503: "1"}.get(status)


def test_readiness_is_that_of_the_models_and_liveness_is_not() -> None:
    loading = StandIn(retry_later(503, "server.not_ready", "loading"))
    assert ask("GET", "/v1/health/live", backend=loading).json() == {"status": "live"}
    assert_problem(ask("GET", "/v1/health/ready", backend=loading), 503, "server.not_ready")
    assert ask("GET", "/v1/health/ready").json() == {"status": "ready"}


def test_a_body_without_a_length_is_counted_while_it_comes() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 512
            yield b" " * 512

    assert_problem(ask("POST", "/v1/score", content=endless(), headers=JSON), 413, "request.too_large")
    assert sent <= 2048


def test_admission_refuses_work_but_not_probes() -> None:
    async def scenario() -> None:
        backend = StandIn()
        backend.release.clear()
        async with client_of(backend, max_inflight_requests=1) as client:
            first = asyncio.ensure_future(client.post("/v1/score", json=SCORE))
            while not backend.calls:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/score", json=SCORE)
            assert_problem(refused, 429, "server.overloaded")
            assert refused.headers["retry-after"] == "1"
            assert (await client.get("/v1/health/live")).status_code == 200
            backend.release.set()
            assert (await first).status_code == 200
            assert (await client.post("/v1/score", json=SCORE)).status_code == 200

    asyncio.run(scenario())


def test_answers_are_the_results_in_order() -> None:
    body = ask("POST", "/v1/score", json={"model": "dna", "sequences": ["ACGT", "A"]}).json()
    assert body["scores"] == [
        {"score": -1.5, "num_tokens": 3, "per_token": None},
        {"score": None, "num_tokens": 0, "per_token": None},
    ]
    assert body["system_fingerprint"] == "dna/abababababab/float32/cpu"
    assert body["usage"]["prompt_tokens"] == 5
    assert ask("GET", "/v1/models").json()["data"] == [CARD.model_dump()]
    assert ask("GET", "/v1/models/dna").json() == CARD.model_dump()


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse a stream; comments vanish."""
    parsed = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            parsed.append((fields["event"], json.loads(fields["data"]) | {"id": fields.get("id")}))
    return parsed


def test_a_stream_is_chunks_then_usage_then_done() -> None:
    response = ask("POST", "/v1/generate", json=STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert [name for name, _ in events] == ["chunk", "chunk", "usage", "done"]
    assert [(data["offset"], data["text"], data["id"]) for _, data in events[:2]] == [(0, "A", "1"), (1, "C", "2")]
    assert events[2][1]["generated_tokens"] == 2
    assert events[3][1]["generations"] == [{"index": 0, "num_tokens": 2, "finish_reason": "stop"}]
    assert "\n\n: ping\n\n" in response.text


@pytest.mark.parametrize("failure", [RuntimeError("GATTACA"), ApiError(503, "server.not_ready", "gone")])
def test_a_fault_inside_a_stream_is_its_last_event(failure: Exception) -> None:
    backend = StandIn(failure)
    response = ask("POST", "/v1/generate", backend=backend, json=STREAM, headers={"x-request-id": "r1"})
    events = events_of(response.text)
    assert [name for name, _ in events] == ["chunk", "error"]
    assert events[1][1]["code"] == ("server.not_ready" if isinstance(failure, ApiError) else "server.internal")
    assert events[1][1]["request_id"] == "r1"
    assert "GATTACA" not in response.text
    assert backend.streams_closed == 1


def test_observed_routes_are_templates() -> None:
    observed: list[dict[str, Any]] = []

    async def scenario() -> None:
        async with client_of(StandIn(), observed=observed) as client:
            for path in ("/v1/models/dna", "/v1/unknown/path", "/v1/health/live"):
                await client.get(path)

    asyncio.run(scenario())
    assert [(entry["route"], entry["status"]) for entry in observed] == [
        ("/v1/models/{model}", 200),
        ("unmatched", 404),
        ("/v1/health/live", 200),
    ]
    assert all(entry["seconds"] > 0 for entry in observed)
