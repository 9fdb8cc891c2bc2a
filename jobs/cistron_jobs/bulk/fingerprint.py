"""What decides a job's result: whether finished parts, or a finished output, belong to the run that finds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from cistron import __version__
from cistron.errors import InputError
from cistron.io import storage
from cistron.models.registry import describe_checkpoint
from cistron_jobs.bulk.config import BulkConfig

Fingerprint: TypeAlias = dict[str, Any]

_WITHOUT_EFFECT: Final = {"model", "output", "device", "actors", "cpus_per_actor", "restart", "token_budget"}
"""Settings that say where and not what; the model counts by its content. How much memory a pass takes is no part of the
result either: a run that was too large for its GPU goes on with a smaller budget."""


_SHA256: Final = "sha256:"


def fingerprint(name: str, config: BulkConfig, inputs: Sequence[str], *, without: Sequence[str] = ()) -> Fingerprint:
    """Return what decides the result of job `name`.

    Args:
        name: of the job.
        config: its settings.
        inputs: names of those that are paths, whose content counts.
        without: names of those that have no effect on the result.

    Raises:
        InputError: no such input file.
        CheckpointError: the model is no native checkpoint.
    """
    manifest = describe_checkpoint(config.model)[1]
    return {
        "job": name,
        "cistron": __version__,
        "model": _SHA256 + hashlib.sha256(to_text(manifest["files"]).encode()).hexdigest(),
        **{field: _content(field, getattr(config, field)) for field in inputs},
        **config.model_dump(mode="json", exclude={*_WITHOUT_EFFECT, *inputs, *without}),
    }


def to_text(content: Mapping[str, Any]) -> str:
    """Return JSON that is the same for equal mappings."""
    return json.dumps(content, sort_keys=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return ``field (was x, is y)`` for each field that differs; contents, which are hashes, only by their names."""
    found = []
    for field in sorted(before.keys() | now.keys()):
        values = [before.get(field), now.get(field)]
        if values[0] != values[1]:
            is_content = any(str(value).startswith(_SHA256) for value in values)
            found.append(f"{field} (other content)" if is_content else f"{field} (was {values[0]!r}, is {values[1]!r})")
    return found


def _content(field: str, path: str) -> str:
    if not storage.exists(path):
        raise InputError(f"{field}: no such file: {path}")
    return _SHA256 + storage.sha256(path)
