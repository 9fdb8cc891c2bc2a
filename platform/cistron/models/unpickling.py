"""Pickles of other software, read without running what they ask for.

A pickle is a program that may call anything it can name. Here it can name what the caller lists and nothing else;
classes whose content nobody needs are replaced by a stand-in that swallows it.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, Final, Self

import torch

_ZIP_MAGIC: Final = b"PK"


class ForbiddenGlobalError(pickle.UnpicklingError):
    """A pickle names something that its reader did not allow."""


class Ignored:
    """Stands in for a class that is not needed, or not installed: takes any arguments and any state."""

    def __new__(cls, *_arguments: Any) -> Self:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        """Ignore the arguments."""

    def __setstate__(self, _state: Any) -> None:
        """Ignore the state."""


def restricted_loads(data: bytes, allowed: Mapping[str, Any], *, ignored: Collection[str] = ()) -> Any:
    """Unpickle `data`.

    Args:
        data: a pickle, or a ``torch.save`` file of one.
        allowed: what the pickle may name, by its dotted name.
        ignored: top-level modules whose classes become :class:`Ignored`.

    Raises:
        ForbiddenGlobalError: it names something else.
        Exception: whatever else a malformed pickle provokes.
    """
    loader = _loader(allowed, frozenset(ignored))
    if data.startswith(_ZIP_MAGIC):
        return torch.load(io.BytesIO(data), map_location="cpu", pickle_module=loader, weights_only=False)
    return loader.Unpickler(io.BytesIO(data)).load()


def _loader(allowed: Mapping[str, Any], ignored: frozenset[str]) -> Any:
    """Return what ``torch.load`` takes for the module ``pickle``."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            dotted = f"{module}.{name}"
            if dotted in allowed:
                return allowed[dotted]
            if module.partition(".")[0] in ignored:
                return Ignored
            raise ForbiddenGlobalError(f"it asks for {dotted}")

    def load(stream: io.BufferedIOBase, **_options: Any) -> Any:
        return Unpickler(stream).load()

    return type("restricted_pickle", (), {"Unpickler": Unpickler, "load": staticmethod(load)})


def _storage_from_bytes(data: bytes) -> Any:
    """Do what ``torch.storage._load_from_bytes`` does, without its trust."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _bytes_from_text(text: str, encoding: str) -> bytes:
    """Do the one thing for which old pickle protocols call ``codecs.encode``."""
    if encoding != "latin1":
        raise ForbiddenGlobalError(f"it asks for the codec {encoding!r}")
    return text.encode(encoding)


TENSORS: Final[Mapping[str, Any]] = {
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _storage_from_bytes,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _bytes_from_text,
}
"""What a pickle of tensors and bytes names."""
