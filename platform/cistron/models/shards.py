"""Safetensors files of a checkpoint: one file, or numbered shards with a Hugging Face style index.

Tensors pass through as a stream of (name, tensor), one of which is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cistron.errors import CheckpointError, CheckpointNotFoundError
from cistron.models.manifest import is_plain_name, read_json
from cistron.models.streaming import SafetensorsWriter

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
MAX_SHARD_BYTES: Final = 5 << 30

_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 1 << 32

NamedTensors: TypeAlias = Iterable[tuple[str, torch.Tensor]]


def write_shards(directory: Path, tensors: NamedTensors, *, names: Collection[str], max_shard_bytes: int) -> None:
    """Write ``model.safetensors``, or shards of at most `max_shard_bytes` and their index, into `directory`.

    Args:
        directory: an existing folder.
        tensors: name and tensor; one of them is in memory at a time.
        names: the names that will come.
        max_shard_bytes: size of a shard; a larger tensor is a shard of its own.
    """
    shards: list[list[str]] = []
    total = 0
    pending = iter(tensors)
    held = next(pending, None)
    while held is not None or not shards:
        path = directory / f"shard-{len(shards)}"
        with SafetensorsWriter(path, names=names, metadata={"format": "pt"}) as writer:
            while held is not None and (not writer.written or writer.num_bytes + held[1].nbytes <= max_shard_bytes):
                writer.add(*held)
                held = next(pending, None)
        shards.append(writer.written)
        total += writer.num_bytes
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / WEIGHTS)
        return
    weight_map = {}
    for number, written in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(written, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that has the same permissions as any other new file.

    The library makes files that only their owner may read, which a service that runs as another user cannot.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(mode)


def is_safetensors(path: Path) -> bool:
    """Return whether a file is, by its name or its first bytes, safetensors: a header length and a JSON object."""
    if path.suffix == ".safetensors":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(_LENGTH_BYTES + 1)
    return start[_LENGTH_BYTES:] == b"{" and int.from_bytes(start[:_LENGTH_BYTES], "little") < _MAX_HEADER_BYTES


def locate_tensors(directory: Path) -> dict[str, list[str]]:
    """Return the names of the tensors of each weight file, by the index or, without one, the single file's header.

    Raises:
        CheckpointNotFoundError: a weight file is missing.
        CheckpointError: the index is malformed, or says something else than the files' headers.
    """
    if not (directory / INDEX).exists():
        with open_safetensors(directory / WEIGHTS) as stream:
            return {WEIGHTS: list(stream.keys())}
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(is_plain_name(file) for file in weight_map.values()):
        raise CheckpointError(f"{directory / INDEX}: 'weight_map' must map tensor names to files of this folder")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        with open_safetensors(directory / file) as stream:
            if strange := sorted(set(names) ^ set(stream.keys())):
                raise CheckpointError(f"{directory / file} and {INDEX} disagree about tensor {strange[0]}")
    return files


def tensor_shapes(directory: Path, files: Mapping[str, list[str]]) -> dict[str, torch.Size]:
    """Return every tensor's shape from the files' headers; no tensor is read."""
    shapes: dict[str, torch.Size] = {}
    for file, names in files.items():
        with open_safetensors(directory / file) as stream:
            shapes.update({name: torch.Size(stream.get_slice(name).get_shape()) for name in names})
    return shapes


def read_tensors(directory: Path, files: Mapping[str, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors one by one; each may still map its file, so copy what must outlive it."""
    for file, names in files.items():
        with open_safetensors(directory / file) as stream:
            for name in names:
                yield name, stream.get_tensor(name)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading on the CPU.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: the file is truncated or not safetensors.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
