"""Safetensors files written as their tensors arrive, for models that do not fit into memory.

The format begins with a header of all dtypes, shapes and offsets. Room for the longest possible one is left at the
start, and filled when the last tensor is written: the format allows trailing spaces there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
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
    """Write a stream of floating-point tensors of up to four dimensions.

    Args:
        path: the file, replaced if it exists.
        tensors: name and tensor; one of them is in memory at a time.
        names: the names that will come.
        metadata: the file's notes.
    """
    room = len(_encoded(dict.fromkeys(names, _LONGEST_ENTRY), metadata))
    room += -room % _LENGTH_BYTES
    entries: dict[str, Any] = {}
    offset = 0
    with path.open("wb") as stream:
        stream.seek(_LENGTH_BYTES + room)
        for name, tensor in tensors:
            flat = tensor.detach().cpu().contiguous().flatten()
            stream.write(flat.view(torch.uint8).numpy().data)
            end = offset + flat.nbytes
            entries[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        stream.seek(0)
        stream.write(room.to_bytes(_LENGTH_BYTES, "little"))
        stream.write(_encoded(entries, metadata).ljust(room))


def _encoded(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return the header."""
    return json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
