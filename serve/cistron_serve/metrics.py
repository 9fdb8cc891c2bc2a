"""What the service counts, exported by Ray for Prometheus as ``ray_<name>``.

Request metrics are measured in the ingress, around the whole answer, streams included; model metrics in the replica.
"""

from __future__ import annotations

from typing import Final, Protocol

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS: Final = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
_RATIO: Final = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


class RequestObserver(Protocol):
    """Hears about every answered HTTP request."""

    def __call__(self, *, route: str, status: int, seconds: float) -> None:
        """Record one answer; `route` is the route's template, never the path that was asked for."""
        ...


class RequestMetrics:
    """Counts HTTP requests by route and status."""

    def __init__(self) -> None:
        tags = ("route", "status")
        self._requests = Counter("api_requests_total", description="Answered HTTP requests.", tag_keys=tags)
        self._seconds = Histogram(
            "api_request_seconds", description="Time to the end of the answer.", boundaries=_SECONDS, tag_keys=tags
        )

    def __call__(self, *, route: str, status: int, seconds: float) -> None:
        """Record one answer."""
        tags = {"route": route, "status": str(status)}
        self._requests.inc(tags=tags)
        self._seconds.observe(seconds, tags=tags)


class ModelMetrics:
    """Counts the work of one model's replica."""

    def __init__(self, model_id: str) -> None:
        tags = ("model",)
        self._generated = Counter("nt_generated_total", description="Generated nucleotides.", tag_keys=tags)
        self._rate = Gauge("tokens_per_second", description="Throughput of the last call.", tag_keys=tags)
        self._wait = Histogram(
            "queue_wait_seconds", description="Wait for the model.", boundaries=_SECONDS, tag_keys=tags
        )
        self._fill = Histogram(
            "batch_fill_ratio", description="Used share of the token budget.", boundaries=_RATIO, tag_keys=tags
        )
        for metric in (self._generated, self._rate, self._wait, self._fill):
            metric.set_default_tags({"model": model_id})

    def waited(self, seconds: float) -> None:
        """Record how long a call waited for the model."""
        self._wait.observe(seconds)

    def batch(self, *, fill: float, tokens: int, seconds: float) -> None:
        """Record one batch of score or embed calls."""
        self._fill.observe(min(fill, 1.0))
        self._rate.set(tokens / seconds)

    def generated(self, tokens: int, *, seconds: float) -> None:
        """Record the tokens of one generate call."""
        if tokens:
            self._generated.inc(tokens)
            self._rate.set(tokens / seconds)
