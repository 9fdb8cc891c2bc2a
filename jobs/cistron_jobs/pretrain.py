"""``cistron pretrain run.yaml``: train a model from fresh weights on prepared shards."""

from __future__ import annotations

from cistron.train.config import PretrainConfig
from cistron.train.trainer import check, locate, pretrain
from cistron_jobs.ray_session import ray_session


def run(config: PretrainConfig) -> str:
    """Train, or resume, and return the run folder."""
    train, config = config.train, locate(config)
    check(config)  # Here too: a fault need not wait for a cluster to start.
    with ray_session(train.num_workers * train.cpus_per_worker + train.reader_cpus + 1):
        return pretrain(config)
