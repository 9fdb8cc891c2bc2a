"""Checkpoints of ``torch.distributed.checkpoint``, read by one process and one tensor at a time.

Such a folder is code: its ``.metadata`` is a pickle that the library loads without restraint. Here it may name the
classes that describe tensors and files, and nothing else. The tensors themselves are read with ``weights_only``.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_saver import save

from cistron.errors import CheckpointError, CheckpointNotFoundError
from cistron.models.manifest import is_plain_name
from cistron.models.sources import TensorSource
from cistron.models.unpickling import ForbiddenGlobalError, restricted_loads

METADATA: Final = ".metadata"

_DESCRIPTIONS: Final[Mapping[str, Any]] = {
    **{
        f"{kind.__module__}.{kind.__qualname__}": kind
        for kind in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": torch.serialization._get_layout,
}


def from_dcp(directory: Path, *, trust_pickle: bool) -> TensorSource:
    """Read the list of tensors of a checkpoint folder; what is not a tensor appears in ``streams``.

    Args:
        directory: holds ``.metadata`` and the ``.distcp`` files.
        trust_pickle: let ``.metadata`` run code.

    Raises:
        CheckpointNotFoundError: there is no ``.metadata``.
        CheckpointError: it is broken, needs code, or points outside the folder.
    """
    described = _read_metadata(directory / METADATA, trust_pickle=trust_pickle)
    shapes, streams = {}, []
    for name, entry in described.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            shapes[name] = torch.Size(entry.size)
        else:
            streams.append(name)
    for info in described.storage_data.values():
        if not is_plain_name(info.relative_path):
            raise CheckpointError(f"{directory / METADATA} points to {info.relative_path!r}, outside the folder")
    reader = filesystem.FileSystemReader(directory)
    reader.set_up_storage_reader(described, is_coordinator=True)
    return TensorSource(
        shapes=shapes,
        load=partial(_load_tensor, reader, described),
        metadata={},
        streams={name: partial(_load_stream, directory, described, name) for name in streams},
    )


def write_dcp(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` into an existing folder, from this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        save(dict(tensors), storage_writer=filesystem.FileSystemWriter(directory), no_dist=True)


def _read_metadata(path: Path, *, trust_pickle: bool) -> metadata.Metadata:
    """Return what ``.metadata`` says."""
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} does not exist, so {path.parent} is no distributed checkpoint")
    data = path.read_bytes()
    try:
        # Paths are those of the machine that wrote it.
        described = pickle.loads(data) if trust_pickle else restricted_loads(data, _DESCRIPTIONS, ignored={"pathlib"})
    except ForbiddenGlobalError as error:
        raise CheckpointError(
            f"{path} cannot be read without running code it names; if you trust its origin, pass trust_pickle=true "
            f"({error})"
        ) from error
    except Exception as error:  # A broken pickle fails in any way it likes.
        raise CheckpointError(f"{path} is truncated or no metadata of a distributed checkpoint: {error}") from error
    if not isinstance(described, metadata.Metadata) or not isinstance(described.storage_data, dict):
        raise CheckpointError(f"{path} is no metadata of a distributed checkpoint")
    return described


def _load_tensor(reader: filesystem.FileSystemReader, described: metadata.Metadata, name: str) -> torch.Tensor:
    """Read one tensor, from however many pieces."""
    entry = described.state_dict_metadata[name]
    assert isinstance(entry, metadata.TensorStorageMetadata), f"{name} is no tensor"
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    planner = DefaultLoadPlanner()
    planner.set_up_planner({name: tensor}, described, is_coordinator=True)
    try:
        reader.read_data(planner.create_local_plan(), planner).wait()
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{error.filename} does not exist, and tensor {name} is in it") from error
    except (RuntimeError, AssertionError, ValueError, OSError, LookupError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{reader.path}: tensor {name} cannot be read, a file is broken: {reason}") from error
    return tensor


def _load_stream(directory: Path, described: metadata.Metadata, name: str) -> list[bytes]:
    """Read the bytes of an entry that is no tensor."""
    found = [info for index, info in described.storage_data.items() if index.fqn == name]
    return [_read_bytes(directory / info.relative_path, info.offset, info.length, name) for info in found]


def _read_bytes(path: Path, offset: int, length: int, name: str) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(length)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} does not exist, and {name} is in it") from error
    if len(data) < length:
        raise CheckpointError(f"{path} is truncated: {name} should end at byte {offset + length:,}")
    return data
