"""Evo 2's weights written in another format's spelling, without more than a few tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.forms import NamedTensors
from cistron.models.evo2.spelling import Spelling, foreign_names, write_foreign
from cistron.models.streaming import mapped_tensors, write_safetensors


def write_file(
    config: Evo2Config,
    spelling: Spelling,
    tensors: NamedTensors,
    destination: Path,
    settings: Mapping[str, Any],
    *,
    key: str | None = None,
) -> None:
    """Write one safetensors file, or one ``.pt`` whose state dict lies under `key` if one is given."""
    if destination.suffix != ".pt":
        stream = write_foreign(config, spelling, tensors)
        names = foreign_names(config, spelling)
        write_safetensors(destination, stream, names=names, metadata={"config": json.dumps(settings)})
        return
    with mapped(config, spelling, tensors, destination.parent) as stored:
        torch.save(stored if key is None else {key: stored}, destination)


def mapped(
    config: Evo2Config, spelling: Spelling, tensors: NamedTensors, folder: Path
) -> AbstractContextManager[dict[str, torch.Tensor]]:
    """Return a context of all foreign tensors at once, mapped from a temporary file: memory need not hold them."""
    stream = write_foreign(config, spelling, tensors)
    return mapped_tensors(stream, names=foreign_names(config, spelling), folder=folder)
