"""Serve the demo's models and call every endpoint over HTTP, as a client on another machine would."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ray import serve

from cistron_serve.app import ServeConfig, build

_HOST: Final = "127.0.0.1"
_TIMEOUT_S: Final = 120
_GENE_START: Final = "ATGAAACGCATTAGCACCACCATTACCACCACC"
_PROTEIN: Final = "MKRISTTITTTITITTGNGAG"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request.

    Attributes:
        request: method and path.
        status: of HTTP.
        milliseconds: from sending to the whole answer.
        digest: a few words about the answer's content.
    """

    request: str
    status: int
    milliseconds: float
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Return the answer for the summary."""
        return asdict(self) | {"milliseconds": round(self.milliseconds, 1)}


def call_every_endpoint(exports: Mapping[str, Path], *, port: int) -> list[Answer]:
    """Serve the checkpoints on a free or given port, call every route, and shut the service down."""
    port = port or _free_port()
    serve.start(http_options={"host": _HOST, "port": port})
    try:
        # One logical CPU is for the ingress; the models answer one after the other here.
        models = {name: {"source": str(folder), "max_batch_tokens": 4096} for name, folder in exports.items()}
        serve.run(build(ServeConfig.model_validate({"models": models})), name="demo", route_prefix="/")
        dna, protein = exports
        return [_call(f"http://{_HOST}:{port}", *request) for request in _requests(dna, protein)]
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


Request = tuple[str, dict[str, Any] | None, Callable[[Any], str]]


def _requests(dna: str, protein: str) -> list[Request]:
    """Return path, body and a digest of the answer for each route; no body means GET."""
    generate = {"model": dna, "prompts": [_GENE_START], "num_tokens": 60, "seed": 1}
    return [
        ("/v1/health/live", None, lambda answer: answer["status"]),
        ("/v1/health/ready", None, lambda answer: answer["status"]),
        ("/v1/models", None, lambda answer: ", ".join(card["id"] for card in answer["data"])),
        ("/v1/generate", generate, lambda answer: answer["generations"][0]["text"]),
        ("/v1/score", {"model": dna, "sequences": [_GENE_START]}, _first_score),
        ("/v1/score", {"model": protein, "sequences": [_PROTEIN]}, _first_score),
        ("/v1/embed", {"model": dna, "sequences": [_GENE_START]}, _first_embedding),
        ("/v1/embed", {"model": protein, "sequences": [_PROTEIN]}, _first_embedding),
        ("/openapi.json", None, lambda answer: f"{len(answer['paths'])} paths"),
    ]


def _call(address: str, path: str, body: dict[str, Any] | None, digest: Callable[[Any], str]) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers={"Content-Type": "application/json"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        content, status = json.load(response), response.status
    milliseconds = 1000 * (time.perf_counter() - start)
    model = f" ({body['model']})" if body else ""
    return Answer(f"{request.get_method()} {path}{model}", status, milliseconds, digest(content))


def _first_score(answer: Any) -> str:
    score = answer["scores"][0]
    return f"mean log-likelihood {score['score']:.4f} over {score['num_tokens']} tokens"


def _first_embedding(answer: Any) -> str:
    ((layer, vector),) = answer["embeddings"][0]["vectors"].items()
    return f"layer {layer}: {len(vector)} numbers"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
