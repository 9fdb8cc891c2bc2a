"""Gauges on Ray's metrics port, for Prometheus and Grafana (exported as ``ray_cistron_train_...``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ray.util.metrics import Gauge

from cistron.train.callbacks.callback import Callback, Run
from cistron.train.metrics import Metrics

GAUGES: Final = {
    "cistron_train_step": "Optimiser steps done.",
    "cistron_train_loss": "Training loss, nats per target.",
    "cistron_train_valid_loss": "Held-out loss, nats per target.",
    "cistron_train_grad_norm": "Global gradient norm before clipping.",
    "cistron_train_learning_rate": "Learning rate.",
    "cistron_train_tokens_per_second": "Tokens per second over all devices.",
    "cistron_train_mfu": "Model FLOP/s utilisation, 0 to 1.",
    "cistron_train_data_wait": "Share of time spent waiting for data, 0 to 1.",
}
"""Every metric that training exports, with its help."""


class RayMetrics(Callback):
    """Sets the gauges on rank 0, tagged with the run."""

    def __init__(self, run_id: str) -> None:
        self._tags = {"run": run_id}
        self._gauges: dict[str, Gauge] = {}

    def on_start(self, run: Run) -> None:
        """Register the gauges."""
        if run.world.is_main:
            self._gauges = {name: Gauge(name, description=text, tag_keys=("run",)) for name, text in GAUGES.items()}

    def on_metrics(self, run: Run, metrics: Metrics) -> None:
        """Set the training gauges."""
        self._set(metrics.to_json())

    def on_evaluation(self, run: Run, values: Mapping[str, float]) -> None:
        """Set the held-out gauge."""
        self._set(values)

    def _set(self, values: Mapping[str, float | int | None]) -> None:
        for name, value in values.items():
            gauge = self._gauges.get(f"cistron_train_{name}")
            if gauge is not None and value is not None:
                gauge.set(value, tags=self._tags)
