"""Tensors of foreign checkpoints, looked up by name and read one at a time.

Safetensors files are opened per tensor and pickled ones are mapped, so a converter's memory is that of the largest
tensor. Unpickling runs no code of the file unless the caller says that he trusts it.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from cistron.errors import CheckpointError, CheckpointNotFoundError
from cistron.models.shards import open_safetensors

_TORCH_REASON: Final = re.compile(r"^.*(?:GLOBAL|WeightsUnpickler error).*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Named tensors that are not in memory yet.

    Attributes:
        shapes: every tensor's shape.
        load: reads the tensor of that name, in its stored dtype, on the CPU.
        metadata: the file's own notes; empty for formats that have none.
        streams: reads the bytes of each entry that is no tensor, such as the state of an FP8 layer: one for each shard
            that has it.
    """

    shapes: Mapping[str, torch.Size]
    load: Callable[[str], torch.Tensor]
    metadata: Mapping[str, Any]
    streams: Mapping[str, Callable[[], Sequence[bytes]]] = field(default_factory=dict)


def from_safetensors(paths: Iterable[Path]) -> TensorSource:
    """Read the headers of safetensors files that together hold one state dict.

    Raises:
        CheckpointNotFoundError: a file is missing.
        CheckpointError: a file is truncated or not safetensors.
    """
    files: dict[str, Path] = {}
    shapes: dict[str, torch.Size] = {}
    metadata: dict[str, Any] = {}
    for path in paths:
        with open_safetensors(path) as stream:
            metadata |= stream.metadata() or {}
            for name in stream.keys():  # noqa: SIM118  # the handle is not a mapping
                files[name] = path
                shapes[name] = torch.Size(stream.get_slice(name).get_shape())
    return TensorSource(shapes=shapes, load=partial(_load_safetensor, files), metadata=metadata)


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> TensorSource:
    """Wrap a state dict that is already loaded or mapped."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return TensorSource(shapes=shapes, load=tensors.__getitem__, metadata=metadata or {})


def unpickle(path: Path, *, trust_pickle: bool, allowed: Sequence[Any] = ()) -> Any:
    """Load a ``torch.save`` file, its tensors mapped from disk where the file allows it.

    Args:
        path: the file.
        trust_pickle: run whatever code the file asks for; otherwise tensors, containers and `allowed` only.
        allowed: harmless classes and functions that the format is known to contain, each as it is or paired with the
            dotted name that the file has for it.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: the file is broken, or needs code that was not allowed.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read without running code it contains, or is broken; if you trust its origin, pass "
            f"trust_pickle=true ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path} is truncated or not a torch.save file: {_first_line(error)}") from error


def json_metadata(source: TensorSource, key: str, *, path: Path) -> dict[str, Any]:
    """Return the JSON object under a metadata key, or an empty one when the key is absent.

    Raises:
        CheckpointError: the text there is not a JSON object.
    """
    text = source.metadata.get(key, "{}")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: metadata key {key!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: metadata key {key!r} must hold a JSON object, got a {type(value).__name__}")
    return value


def _load_safetensor(files: Mapping[str, Path], name: str) -> torch.Tensor:
    with open_safetensors(files[name]) as stream:
        tensor: torch.Tensor = stream.get_tensor(name)
    return tensor


def _first_line(error: Exception) -> str:
    """Return what went wrong, without the advice that torch puts around it."""
    text = str(error)
    reason = _TORCH_REASON.search(text)
    return reason[0].strip() if reason else text.strip().partition("\n")[0]
