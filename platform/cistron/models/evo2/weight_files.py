"""Weight files of Evo 2 as they are published: one file, or a file cut into parts.

Either becomes a :class:`TensorSource`. A ``.pt`` is mapped, so its tensors enter memory one by one; parts are first
joined in a temporary file, which takes disk and no memory.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from cistron.errors import CheckpointError, CheckpointNotFoundError
from cistron.models.shards import is_safetensors
from cistron.models.sources import TensorSource, from_safetensors, from_tensors, unpickle

Unwrap: TypeAlias = Callable[[dict[Any, Any]], dict[Any, Any]]
"""Finds the state dict in what a file holds."""

STATE: Final = re.compile(r"(.*\.)?_extra_state(/.*)?")
"""Names of FP8 states, which are bytes and no weights."""

_PART: Final = re.compile(r"(?P<file>.+\.pt)\.part(?P<number>\d+)")
_NAMES_SHOWN: Final = 5
_COPY_BYTES: Final = 1 << 24

_RECONSTRUCT: Final = np.zeros(0).__reduce__()[0]
_HARMLESS: Final = (
    io.BytesIO,
    bytes,  # An empty one: of FP8 states of nothing.
    # Random states, which training software leaves beside the weights.
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
)


def open_weights(source: Path, *, trust_pickle: bool, unwrap: Unwrap = dict) -> tuple[Path, TensorSource]:
    """Open one weight file: ``.safetensors`` or ``.pt``, whole or in parts.

    Args:
        source: the file, one of its ``.pt.partN``, or a folder that holds nothing else of these kinds.
        trust_pickle: allow a ``.pt`` to run code.
        unwrap: finds the state dict in a ``.pt``.

    Returns:
        The file's path, without a part's number, and its tensors.

    Raises:
        CheckpointNotFoundError: no such file, or a part is missing.
        CheckpointError: a file is broken, holds something else than tensors, or needs `trust_pickle`.
    """
    path = _weight_file(source)
    if is_safetensors(path):
        return path, _without_states(from_safetensors([path]))
    parts = {int(match["number"]): part for part in path.parent.glob("*") if (match := _part_of(part, path))}
    if path.exists() or not parts:
        return path, as_source(unwrap(read_pickle(path, trust_pickle=trust_pickle)), path)
    with _joined(parts, path) as whole:
        try:
            return path, as_source(unwrap(read_pickle(whole, trust_pickle=trust_pickle, shown=path)), path)
        except CheckpointError as error:
            sizes = ", ".join(f"part{number} {parts[number].stat().st_size:,}" for number in sorted(parts))
            hint = f" (joined from {len(parts)} parts, in bytes: {sizes}; is the last one missing or one cut short?)"
            raise CheckpointError(f"{error}{hint}") from error


def read_pickle(path: Path, *, trust_pickle: bool, shown: Path | None = None) -> dict[Any, Any]:
    """Return the mapping that a ``.pt`` holds, its tensors mapped; `shown` is its name in errors.

    Raises:
        CheckpointError: the file is broken, holds something else, or needs `trust_pickle`.
    """
    shown = shown or path
    try:
        content = unpickle(path, trust_pickle=trust_pickle, allowed=_HARMLESS)
    except CheckpointError as error:
        if path == shown:
            raise
        raise CheckpointError(str(error).replace(str(path), str(shown))) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{shown} must hold a mapping of tensors, got a {type(content).__name__}")
    return content


def as_source(content: Mapping[Any, Any], shown: Path) -> TensorSource:
    """Tell tensors from byte streams.

    Raises:
        CheckpointError: an entry is neither.
    """
    tensors: dict[str, torch.Tensor] = {}
    streams: dict[str, Callable[[], Sequence[bytes]]] = {}
    for key, value in content.items():
        name = str(key)
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif STATE.fullmatch(name):
            streams[name] = partial(_stream, value)
        else:
            raise CheckpointError(f"{shown}: {name} is a {type(value).__name__}, not a tensor")
    source = _without_states(from_tensors(tensors))
    return replace(source, streams={**source.streams, **streams})


def _stream(value: object) -> list[bytes]:
    """Return the bytes of an FP8 state; it may be absent."""
    return [value.getvalue()] if isinstance(value, io.BytesIO) else []


def _without_states(source: TensorSource) -> TensorSource:
    """Move FP8 states that are tensors of bytes to where the other byte streams are."""
    states = [name for name in source.shapes if STATE.fullmatch(name)]
    shapes = {name: shape for name, shape in source.shapes.items() if name not in states}
    return replace(source, shapes=shapes, streams={name: partial(_tensor_stream, source, name) for name in states})


def _tensor_stream(source: TensorSource, name: str) -> list[bytes]:
    tensor = source.load(name)
    return [tensor.numpy().tobytes()] if tensor.dtype == torch.uint8 else []


def _weight_file(source: Path) -> Path:
    """Return the weight file that `source` means, which may exist only in parts."""
    if source.is_dir():
        found = {_unsplit(path) for path in source.iterdir() if _unsplit(path).suffix in {".pt", ".safetensors"}}
        if len(found) != 1:
            names = sorted(path.name for path in found)
            listed = ", ".join(names[:_NAMES_SHOWN]) or "none"
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            raise CheckpointNotFoundError(
                f"{source} must hold one .pt or .safetensors checkpoint, found {listed}{more}"
            )
        return found.pop()
    return _unsplit(source)


def _unsplit(path: Path) -> Path:
    """Return the path of the file that a part belongs to; other paths stay."""
    match = _PART.fullmatch(path.name)
    return path.with_name(match["file"]) if match else path


def _part_of(candidate: Path, path: Path) -> re.Match[str] | None:
    match = _PART.fullmatch(candidate.name)
    return match if match and match["file"] == path.name else None


@contextmanager
def _joined(parts: Mapping[int, Path], path: Path) -> Any:
    """Yield a file of all parts in order; it is gone afterwards, except for what is mapped."""
    if absent := sorted(set(range(max(parts) + 1)) - parts.keys()):
        raise CheckpointNotFoundError(f"{path}.part{absent[0]} does not exist, but part {max(parts)} does")
    folder = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".joined") as joined:
        for number in range(len(parts)):
            with parts[number].open("rb") as part:
                shutil.copyfileobj(part, joined, length=_COPY_BYTES)
        joined.flush()
        yield Path(joined.name)
