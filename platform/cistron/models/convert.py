"""Checkpoints of other software to the native format, and back.

A conversion streams: one tensor is read, renamed, checked and written at a time. Nothing appears under the
destination's name before everything is there, so a failed conversion never looks like a small success.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch

from cistron.config import parse_yaml
from cistron.errors import InputError, UnknownNameError, nearest
from cistron.io.atomic import new_directory, new_file
from cistron.models.checkpoint import check_tensors, iterate_checkpoint, read_config, write_checkpoint
from cistron.models.esm2 import convert as esm2
from cistron.models.evo2 import convert as evo2
from cistron.models.families import ModelConfig
from cistron.models.manifest import sha256

NATIVE: Final = "cistron"

Tensors: TypeAlias = Iterator[tuple[str, torch.Tensor]]
Reader: TypeAlias = Callable[..., tuple[ModelConfig, Tensors]]
Writer: TypeAlias = Callable[[Any, Tensors, Path], None]

READERS: Final[Mapping[str, Reader]] = {
    "vortex": cast(Reader, evo2.read_vortex),
    "hf": cast(Reader, esm2.read_hf),
    "fair-esm": cast(Reader, esm2.read_fair_esm),
}
"""Formats that can be converted from, beside the native one."""

WRITERS: Final[Mapping[str, tuple[str, Writer]]] = {
    "vortex": ("evo2", evo2.write_vortex),
    "hf": ("esm", esm2.write_hf),
    "fair-esm": ("esm", esm2.write_fair_esm),
}
"""Formats that can be converted to, beside the native one, with the ``model_type`` that each can hold."""

_PART: Final = re.compile(r"\.part\d+$")
"""Large files are published in pieces with such names."""

_FOLDER_FORMATS: Final = frozenset({"hf"})
"""Written as a folder; the others are one file."""


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    source_format: str,
    target_format: str = NATIVE,
    config: str | Path | Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> Path:
    """Convert a checkpoint and return the destination.

    Args:
        source: file or folder, as the format has it.
        destination: must not exist, or be an empty folder.
        source_format: ``vortex``, ``hf``, ``fair-esm`` or ``cistron``.
        target_format: the same choice.
        config: the source's configuration in its own field names, or a JSON or YAML file of it, where the source does
            not say: custom sizes in bare weight files.
        trust_pickle: let a pickled source run code. Without it only tensors and a few harmless types are unpickled.

    Raises:
        UnknownNameError: no such format.
        CheckpointNotFoundError: there is nothing at `source`.
        CheckpointError: the source's tensors are not those of its configuration, or it needs `trust_pickle`.
        InputError: the destination exists, or the target format cannot hold this family.
    """
    source, destination = Path(source), Path(destination)
    _check_format("source_format", source_format, READERS)
    _check_format("target_format", target_format, WRITERS)
    if source_format == NATIVE and config is not None:
        raise InputError("config does not apply to source_format cistron, whose config.json says everything")
    if source_format == NATIVE:
        parsed, tensors = read_config(source), iterate_checkpoint(source)
    else:
        parsed, tensors = READERS[source_format](source, config=_settings(config), trust_pickle=trust_pickle)
    if target_format == NATIVE:
        return write_checkpoint(parsed, tensors, destination, provenance=_provenance(source, source_format))
    model_type, write = WRITERS[target_format]
    if parsed.model_type != model_type:
        raise InputError(
            f"target_format {target_format} holds {model_type} models, and {source} is {parsed.model_type}"
        )
    create = new_directory if target_format in _FOLDER_FORMATS else _new_file
    with create(destination) as staging:
        write(parsed, check_tensors(tensors, parsed, source=str(source)), staging)
    return destination


def _new_file(destination: Path) -> Any:
    """Refuse to replace a file, unlike :func:`new_file`."""
    if destination.exists():
        raise InputError(f"destination {destination} already exists; remove it or choose another")
    return new_file(destination)


def _check_format(setting: str, name: str, foreign: Mapping[str, Any]) -> None:
    known = [*foreign, NATIVE]
    if name not in known:
        raise UnknownNameError(f"{setting}: unknown format {name!r}{nearest(name, known)} (known: {', '.join(known)})")


def _settings(config: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the configuration of the source; a file of it may be JSON, which is YAML."""
    if config is None or isinstance(config, Mapping):
        return config
    path = Path(config)
    if not path.is_file():
        raise InputError(f"config: no such file: {path}")
    return parse_yaml(path.read_text(), source=str(path))


def _provenance(source: Path, source_format: str) -> dict[str, Any]:
    """Say what was converted, so that a checkpoint can be traced to the bytes it came from."""
    if source.is_dir():
        files = [path for path in source.iterdir() if path.is_file()]
    else:
        whole = source.with_name(_PART.sub("", source.name))
        files = [whole] if whole.is_file() else list(source.parent.glob(f"{whole.name}.part*"))
    return {
        "source": source.name,
        "source_format": source_format,
        "source_files": {path.name: sha256(path) for path in sorted(files)},
    }
