"""Safetensors files written as their tensors arrive, for models that do not fit into memory.

The format begins with a header of all dtypes, shapes and offsets. Room for the longest possible one is left at the
start, and filled when the last tensor is written: the format allows trailing spaces there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors.torch import load_file

from cistron.errors import CheckpointError

_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_LONGEST_ENTRY: Final = {"dtype": "BF16", "shape": [10**12] * 4, "data_offsets": [10**15, 10**15]}
_LENGTH_BYTES: Final = 8


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    names: Collection[str],
    metadata: Mapping[str, str],
) -> None:
    """Write a stream of tensors of up to four dimensions.

    Args:
        path: the file, replaced if it exists.
        tensors: name and tensor; one of them is in memory at a time.
        names: the names that will come.
        metadata: the file's notes.
    """
    with SafetensorsWriter(path, names=names, metadata=metadata) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)


@contextmanager
def mapped_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], *, names: Collection[str], folder: Path
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a stream's tensors all at once, mapped from a temporary file in `folder`: memory need not hold them."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".safetensors") as file:
        write_safetensors(Path(file.name), tensors, names=names, metadata={})
        yield load_file(file.name)


class SafetensorsWriter:
    """A safetensors file that grows tensor by tensor; it is valid once the ``with`` block has ended.

    Args:
        path: the file, replaced if it exists.
        names: the names that may come.
        metadata: the file's notes.
    """

    def __init__(self, path: Path, *, names: Collection[str], metadata: Mapping[str, str]) -> None:
        self._metadata = metadata
        self._room = len(_encoded(dict.fromkeys(names, _LONGEST_ENTRY), metadata))
        self._room += -self._room % _LENGTH_BYTES
        self._entries: dict[str, Any] = {}
        self._stream = path.open("wb")
        self._stream.seek(_LENGTH_BYTES + self._room)
        self.num_bytes = 0

    @property
    def written(self) -> list[str]:
        """Names of the tensors so far."""
        return list(self._entries)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor.

        Raises:
            CheckpointError: numbers of a kind that weights are not stored in, such as scaled 8-bit ones.
        """
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"tensor {name} holds {tensor.dtype}, which checkpoints are not written in")
        flat = tensor.detach().cpu().contiguous().flatten()
        self._stream.write(flat.view(torch.uint8).numpy().data)
        end = self.num_bytes + flat.nbytes
        self._entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.num_bytes, end],
        }
        self.num_bytes = end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the header, unless something failed, and close the file."""
        with self._stream:
            if kind is None:
                self._stream.seek(0)
                self._stream.write(self._room.to_bytes(_LENGTH_BYTES, "little"))
                self._stream.write(_encoded(self._entries, self._metadata).ljust(self._room))


def _encoded(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return the header."""
    return json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
