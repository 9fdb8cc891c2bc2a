"""The service as its users meet it: Ray Serve on a local Ray, spoken to over real HTTP."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from fastapi.openapi.models import OpenAPI
from ray import serve

from cistron import embed_sequences, generate, load_model, score_sequences
from cistron.errors import ConfigError
from cistron.models.base import SequenceModel
from cistron.models.checkpoint import save_checkpoint
from cistron.models.registry import build_model
from cistron_serve.app import build

pytestmark = pytest.mark.ray

MAX_BODY_BYTES = 65_536
BATCH_WAIT_S = 0.3
DNA = ["ACGTTGCAAC", "GGGATTACAGGCATTAGACCA", "TTN", "acgtACGTR"]
PROTEINS = ["MKTAYIAKQR", "GSHMV"]
LONG_PROTEIN = "MKTAYIAKQRQISFVKSHFSRQ" * 60
PROMPT = {"model": "dna", "prompts": ["A"], "num_tokens": 5}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("evo2_tiny", "esm2_tiny"):
        model = build_model(name)
        model.init_weights(seed=1)
        save_checkpoint(model, folder / name)
    return {"dna": folder / "evo2_tiny", "protein": folder / "esm2_tiny"}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, SequenceModel]:
    return {name: load_model(path) for name, path in checkpoints.items()}


def settings(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return {
        "ingress": {"max_body_bytes": MAX_BODY_BYTES},
        "models": {
            "dna": {"source": str(checkpoints["dna"]), "batch_wait_timeout_s": BATCH_WAIT_S},
            "protein": {"source": str(checkpoints["protein"]), "max_ongoing_requests": 1, "max_queued_requests": 1},
        },
    }


@pytest.fixture(scope="module")
def client(checkpoints: dict[str, Path]) -> Iterator[httpx.Client]:
    port = free_port()
    before = descendants(os.getpid())  # Helpers that earlier tests of this process left, such as a resource tracker.
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(settings(checkpoints)), name="cistron", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield http
    finally:
        started = set(descendants(os.getpid())).difference(before)
        serve.shutdown()
        ray.shutdown()
    assert len(started) > 4
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline, f"left running: {[pid for pid in started if is_running(pid)]}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def descendants(root: int) -> list[int]:
    """Processes below `root`, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, frontier = [], {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def post(client: httpx.Client, route: str, **body: Any) -> Any:
    response = client.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events_of(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in response.read().decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            events.append((fields["event"], json.loads(fields["data"])))
    return events


def test_models_and_health(
    client: httpx.Client, models: dict[str, SequenceModel], checkpoints: dict[str, Path]
) -> None:
    assert client.get("/v1/health/live").json() == {"status": "live"}
    assert client.get("/v1/health/ready").json() == {"status": "ready"}
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["dna", "protein"]
    for name, model in models.items():
        manifest = json.loads((checkpoints[name] / "manifest.json").read_text())
        card = cards[name]
        assert card["sha256"] == manifest["files"]["model.safetensors"]["sha256"]
        assert card["num_parameters"] == model.num_parameters()
        assert (card["family"], card["dtype"], card["device"]) == (model.family, "float32", "cpu")
        trained = model.config.max_length  # type: ignore[attr-defined]
        assert card["trained_length"] == trained
        assert card["max_length"] == (trained if name == "dna" else card["limits"]["max_tokens"])
    assert cards["protein"]["operations"] == ["score", "embed"]
    assert client.get("/v1/models/dna").json() == cards["dna"]


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum", "reverse_complement": True}, {"reduction": "none", "prepend_bos": True}],
)
def test_scores_are_those_of_the_library(
    client: httpx.Client, models: dict[str, SequenceModel], options: dict[str, Any]
) -> None:
    answer = post(client, "score", model="dna", sequences=DNA, **options)
    for got, expected in zip(answer["scores"], score_sequences(models["dna"], DNA, **options), strict=True):
        assert got["score"] == pytest.approx(expected.score, rel=1e-5)
        assert got["num_tokens"] == expected.num_tokens
        assert (got["per_token"] is None) == (expected.per_token is None)
        if expected.per_token is not None:
            np.testing.assert_allclose(got["per_token"], expected.per_token, rtol=1e-4)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, DNA))
    assert answer["system_fingerprint"].startswith("dna/")


def test_protein_scores_are_those_of_the_library(client: httpx.Client, models: dict[str, SequenceModel]) -> None:
    answer = post(client, "score", model="protein", sequences=PROTEINS)
    expected = score_sequences(models["protein"], PROTEINS)
    assert [score["score"] for score in answer["scores"]] == pytest.approx([e.score for e in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "sequences", "options"),
    [
        ("dna", DNA, {}),
        ("dna", DNA[:2], {"layers": ["blocks.3", -1], "pooling": "last"}),
        ("protein", PROTEINS, {"layers": ["embedding", 1], "pooling": "none"}),
        ("protein", PROTEINS, {"pooling": "cls"}),
        ("protein", [LONG_PROTEIN, "GSHMV"], {}),
        ("protein", [LONG_PROTEIN], {"window": 200, "pooling": "last"}),
    ],
)
def test_embeddings_are_those_of_the_library(
    client: httpx.Client, models: dict[str, SequenceModel], name: str, sequences: list[str], options: dict[str, Any]
) -> None:
    answer = post(client, "embed", model=name, sequences=sequences, **options)
    for got, expected in zip(answer["embeddings"], embed_sequences(models[name], sequences, **options), strict=True):
        assert list(got["vectors"]) == [str(layer) for layer in expected.vectors]
        assert got["num_tokens"] == expected.num_tokens
        for layer, vector in expected.vectors.items():
            np.testing.assert_allclose(got["vectors"][str(layer)], vector, rtol=1e-4, atol=1e-5)


def test_generations_are_those_of_the_library(client: httpx.Client, models: dict[str, SequenceModel]) -> None:
    options: dict[str, Any] = {"num_tokens": 30, "seed": 3, "temperature": 0.8, "top_k": 3, "stop": ["AAA"]}
    answer = post(client, "generate", model="dna", prompts=DNA[:2], **options)
    expected = generate(models["dna"], DNA[:2], **options)
    assert [g["token_ids"] for g in answer["generations"]] == [e.token_ids for e in expected]
    assert [g["text"] for g in answer["generations"]] == [e.text for e in expected]
    assert [g["finish_reason"] for g in answer["generations"]] == [e.finish_reason for e in expected]
    np.testing.assert_allclose(answer["generations"][0]["logprobs"], expected[0].logprobs, rtol=1e-3, atol=1e-4)
    assert answer["usage"]["generated_tokens"] == sum(len(e.token_ids) for e in expected)


def test_a_stream_adds_up_to_the_whole_answer(client: httpx.Client) -> None:
    body = {"model": "dna", "prompts": DNA[:2], "num_tokens": 150, "seed": 5}
    whole = post(client, "generate", **body)
    with client.stream("POST", "/v1/generate", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response)
    chunks = [data for name, data in events if name == "chunk"]
    assert [name for name, _ in events[-2:]] == ["usage", "done"]
    assert len(chunks) >= 6  # 150 tokens do not fit into two chunks of 64.
    for index, generation in enumerate(whole["generations"]):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == generation["text"]
        assert [token for chunk in own for token in chunk["token_ids"]] == generation["token_ids"]
        assert [chunk["offset"] for chunk in own] == list(np.cumsum([0] + [len(c["token_ids"]) for c in own[:-1]]))
    assert events[-2][1]["generated_tokens"] == 300
    assert [g["num_tokens"] for g in events[-1][1]["generations"]] == [150, 150]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model(client: httpx.Client, stream: bool) -> None:
    body = {"model": "dna", "prompts": ["ACGT"], "num_tokens": 8000, "stream": stream}
    if stream:
        with client.stream("POST", "/v1/generate", json=body) as response:
            assert next(line for line in response.iter_lines() if line.startswith("event:")) == "event: chunk"
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/generate", json=body, timeout=0.5)
    start = time.monotonic()
    post(client, "score", model="dna", sequences=["ACGT"])
    assert time.monotonic() - start < 5  # The rest of the generation would take much longer.


def test_requests_that_come_together_are_batched_and_answered_as_alone(client: httpx.Client) -> None:
    rng = np.random.default_rng(0)
    bodies = [
        {
            "model": "dna",
            "sequences": ["".join(rng.choice(list("ACGT"), size=rng.integers(2, 40))) for _ in range(1 + number % 3)],
            "reduction": ["mean", "sum"][number % 2],
        }
        for number in range(16)
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        start = time.monotonic()
        together = list(pool.map(lambda body: post(client, "score", **body), bodies))
        elapsed = time.monotonic() - start
    assert elapsed < len(bodies) * BATCH_WAIT_S / 2  # One by one, each would wait for its own batch to fill.
    for body, answer in list(zip(bodies, together, strict=True))[:6]:
        alone = post(client, "score", **body)
        assert [s["score"] for s in answer["scores"]] == pytest.approx([s["score"] for s in alone["scores"]], rel=1e-5)


def test_a_full_queue_is_answered_with_429(client: httpx.Client) -> None:
    body = {"model": "protein", "sequences": ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEV" * 8]}
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(client.post, "/v1/score", json=body) for _ in range(8)]
        assert client.get("/v1/health/ready").status_code == 200  # Busy is not broken.
        responses = [response.result() for response in pending]
    assert {response.status_code for response in responses} == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert response.headers["retry-after"] == "1"
            assert_problem(response, 429, "server.overloaded")


def assert_problem(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail", "code", "param", "request_id"}
    assert (body["status"], body["code"], body["param"]) == (status, code, param)
    assert body["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("route", "body", "status", "code", "param"),
    [
        ("score", {"model": "dna", "sequences": []}, 422, "request.invalid", "sequences"),
        ("score", {"model": "dna", "sequences": [""]}, 422, "request.invalid", "sequences[0]"),
        ("score", {"model": "dna", "sequences": ["AC", "ACGJ"]}, 422, "sequence.invalid", "sequences[1]"),
        ("score", {"model": "dna", "sequences": ["MKTAYIAKQRLLL"]}, 422, "sequence.invalid", "sequences[0]"),
        ("score", {"model": "dna", "sequences": ["A" * 8193]}, 422, "sequence.too_long", "sequences[0]"),
        ("score", {"model": "protein", "sequences": ["MK*"]}, 422, "sequence.invalid", "sequences[0]"),
        ("score", {"model": "protein", "sequences": ["M" * 35_000]}, 413, "request.too_large", None),
        ("embed", {"model": "protein", "sequences": ["M"], "window": 1023}, 422, "request.limit_exceeded", "window"),
        ("score", {"model": "protein", "sequences": ["MK<mask>"]}, 422, "sequence.invalid", "sequences[0]"),
        ("score", {"model": "dna", "sequences": ["A"] * 65}, 422, "request.limit_exceeded", "sequences"),
        ("score", {"model": "dna", "sequences": ["A"], "reduce": "sum"}, 422, "request.invalid", "reduce"),
        ("score", {"model": "dma", "sequences": ["A"]}, 404, "model.not_found", "model"),
        ("embed", {"model": "dna", "sequences": ["A"], "layers": ["blocks.7"]}, 422, "layer.not_found", "layers[0]"),
        ("embed", {"model": "dna", "sequences": ["A"], "pooling": "cls"}, 422, "model.wrong_family", "pooling"),
        ("generate", {"model": "protein", "prompts": ["MK"], "num_tokens": 5}, 422, "model.wrong_family", "model"),
        ("generate", PROMPT | {"num_tokens": -1}, 422, "request.invalid", "num_tokens"),
        ("generate", PROMPT | {"num_tokens": 8192}, 422, "request.limit_exceeded", "num_tokens"),
        ("generate", PROMPT | {"allowed": "Ā"}, 422, "request.invalid", "allowed"),
        ("generate", PROMPT | {"prompts": ["É"], "stream": True}, 422, "sequence.invalid", "prompts[0]"),
        ("nothing", {}, 404, "route.not_found", None),
        ("models", {}, 405, "route.method_not_allowed", None),
    ],
)  # fmt: skip
def test_bad_requests(
    client: httpx.Client, route: str, body: dict[str, Any], status: int, code: str, param: Any
) -> None:
    assert_problem(client.post(f"/v1/{route}", json=body), status, code, param)


def test_bad_bodies(client: httpx.Client) -> None:
    def send(content: bytes, **headers: str) -> httpx.Response:
        return client.post("/v1/score", content=content, headers=JSON | headers)

    assert_problem(send(b'{"model": '), 400, "request.malformed_json")
    assert_problem(send(b" " * (MAX_BODY_BYTES + 1)), 413, "request.too_large")
    assert_problem(send(b"x", **{"content-encoding": "gzip"}), 415, "request.unsupported_encoding")
    assert_problem(send(b"x", **{"content-type": "text/plain"}), 415, "request.unsupported_media_type")
    pieces = (b" " * 8192 for _ in range(9))
    assert_problem(client.post("/v1/score", content=pieces, headers=JSON), 413, "request.too_large")
    assert_problem(client.get("/v1/score"), 405, "route.method_not_allowed")


def test_a_request_id_is_kept(client: httpx.Client) -> None:
    response = client.get("/v1/nothing", headers={"x-request-id": "my-request-7"})
    assert response.json()["request_id"] == response.headers["x-request-id"] == "my-request-7"


def test_the_openapi_schema_describes_the_service(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    OpenAPI.model_validate(document)
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        *(f"/v1/{operation}" for operation in ("score", "embed", "generate", "models", "models/{model}")),
        *("/v1/health/live", "/v1/health/ready"),
    }
    for route in ("score", "embed", "generate"):
        operation = document["paths"][f"/v1/{route}"]["post"]
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == f"#/components/schemas/{route.capitalize()}Request"
        for status in ("400", "404", "413", "415", "422", "429", "500", "503"):
            content = operation["responses"][status]["content"]
            assert content == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    answers = document["paths"]["/v1/generate"]["post"]["responses"]["200"]["content"]
    assert set(answers) == {"application/json", "text/event-stream"}
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]


def test_a_misspelt_setting_fails_before_anything_starts(checkpoints: dict[str, Path]) -> None:
    wrong = settings(checkpoints)
    wrong["models"]["dna"]["max_batch_token"] = 5
    with pytest.raises(ConfigError, match="did you mean 'max_batch_tokens'"):
        build(wrong)
