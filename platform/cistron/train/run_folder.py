"""The folder of a run: who may write into it, and what it says when the run is over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from cistron.config import parse_yaml, resolve, to_yaml
from cistron.errors import ConfigError
from cistron.io import storage
from cistron.train.checkpoint import CheckpointStore
from cistron.train.config import PretrainConfig

FREE_KEYS: Final = frozenset(
    {
        "run_dir",
        "data.path",
        "train.num_workers",
        "train.use_gpu",
        "train.cpus_per_worker",
        "train.reader_cpus",
        "train.preflight",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.evaluate_every",
        "train.evaluate_samples",
        "train.log_every",
        "train.max_failures",
        "train.recompute",
        "train.peak_flops",
    }
)
"""Settings that may change when a run resumes: they change neither the samples of a step nor the mathematics."""


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = storage.name_of(path)
        self.checkpoints = CheckpointStore(path)
        self.export = storage.join(path, "export")
        self._config = storage.join(path, "config.yaml")

    def claim(self, config: PretrainConfig) -> None:
        """Write ``config.yaml``: from now on the folder belongs to this run.

        Raises:
            ConfigError: the folder holds a run with other settings; names each.
        """
        self.check(config)
        storage.make_dirs(self.path)
        storage.write_text(self._config, to_yaml(config))

    def check(self, config: PretrainConfig) -> None:
        """Check that the folder is free, or that this is the run which was begun here.

        Raises:
            ConfigError: the folder holds a run with other settings; names each.
        """
        file = self._config
        if storage.exists(file):
            began = resolve(PretrainConfig, parse_yaml(storage.read_text(file), source=file))
            if faults := contradictions(began, config):
                listed = "\n".join(f"  {fault}" for fault in faults)
                raise ConfigError(
                    f"{self.path} holds a run with other settings; choose another run_dir, or undo:\n{listed}"
                )

    def forget_ray(self) -> None:
        """Delete Ray Train's list of checkpoints; the manifests are the truth.

        Ray refuses to begin when a kill cut its file short, or when another version of Ray wrote it.
        """
        storage.remove_tree(storage.join(self.path, "checkpoint_manager_snapshot.json"))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        storage.write_text(storage.join(self.path, "summary.json"), json.dumps(dict(summary), indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """Return ``summary.json`` of a run that has ended, or None."""
        file = storage.join(self.path, "summary.json")
        return json.loads(storage.read_text(file)) if storage.exists(file) else None


def contradictions(began: PretrainConfig, wanted: PretrainConfig) -> list[str]:
    """Return one line for each setting of `wanted` that would not continue the run that `began` describes."""
    old, new = _identity(began), _identity(wanted)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: the run has {old.get(key)!r}, got {new.get(key)!r}" for key in keys]


def _identity(config: PretrainConfig) -> dict[str, Any]:
    """Return the settings that decide a run's numbers, by dotted path.

    The number of steps is one of them only where the learning rate depends on it: a longer run with the same rates is
    the same run.
    """
    flat = {key: value for key, value in _flatten(config.model_dump(mode="json")) if key not in FREE_KEYS}
    steps = flat.pop("train.steps")
    if config.train.schedule.kind != "constant" and config.train.schedule.decay_steps is None:
        flat["train.schedule.decay_steps"] = steps
    return flat


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in tree.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
