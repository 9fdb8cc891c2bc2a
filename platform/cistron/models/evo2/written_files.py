"""Evo 2's weights written in another format's spelling, without more than a few tensors in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.forms import NamedTensors
from cistron.models.evo2.spelling import Spelling, foreign_names, write_foreign
from cistron.models.streaming import write_safetensors


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


@contextmanager
def mapped(
    config: Evo2Config, spelling: Spelling, tensors: NamedTensors, folder: Path
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the foreign tensors all at once, mapped from a temporary file so that memory need not hold them."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".safetensors") as file:
        stream = write_foreign(config, spelling, tensors)
        write_safetensors(Path(file.name), stream, names=foreign_names(config, spelling), metadata={})
        yield load_file(file.name)
