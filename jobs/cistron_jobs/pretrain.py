"""``cistron pretrain run.yaml``: train a model from fresh weights on prepared shards."""

from __future__ import annotations

from cistron.train.config import PretrainConfig
from cistron.train.trainer import pretrain
from cistron_jobs.ray_session import ray_session


def run(config: PretrainConfig) -> str:
    """Train, or resume, and return the run folder."""
    train = config.train
    with ray_session(train.num_workers * train.cpus_per_worker + train.reader_cpus + 1):
        return pretrain(config)
