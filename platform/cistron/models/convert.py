"""Checkpoints of other software to the native format, and back.

A conversion streams: one tensor is read, renamed, checked and written at a time. Nothing appears under the
destination's name before everything is there, so a failed conversion never looks like a small success.

The formats are ``cistron``, the native one; of Evo 2 ``vortex``, ``savanna`` and ``mbridge``, which ``evo2.convert``
describes; of ESM-2 ``hf``, ``fair-esm`` and ``bionemo-te``, which ``esm2.convert`` does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, cast, get_args

import torch

from cistron.config import parse_yaml
from cistron.errors import InputError, UnknownNameError, nearest
from cistron.io.atomic import new_directory, new_files
from cistron.models.checkpoint import check_tensors, iterate_checkpoint, read_config, write_checkpoint
from cistron.models.detect import AUTO, NATIVE, detect_format
from cistron.models.esm2 import convert as esm2
from cistron.models.evo2 import convert as evo2
from cistron.models.evo2.config import Evo2Config, Parametrization
from cistron.models.evo2.forms import to_form
from cistron.models.families import ModelConfig
from cistron.models.manifest import sha256

logger = logging.getLogger(__name__)

Tensors: TypeAlias = Iterator[tuple[str, torch.Tensor]]
Reader: TypeAlias = Callable[..., tuple[ModelConfig, Tensors]]
Writer: TypeAlias = Callable[[Any, Tensors, Path], None]

READERS: Final[Mapping[str, Reader]] = {
    "vortex": cast(Reader, evo2.read_vortex),
    "savanna": cast(Reader, evo2.read_savanna),
    "mbridge": cast(Reader, evo2.read_mbridge),
    "hf": cast(Reader, esm2.read_hf),
    "fair-esm": cast(Reader, esm2.read_fair_esm),
    "bionemo-te": cast(Reader, esm2.read_bionemo_te),
}
"""Formats that can be converted from, beside the native one."""

WRITERS: Final[Mapping[str, tuple[str, Writer]]] = {
    "vortex": ("evo2", evo2.write_vortex),
    "savanna": ("evo2", evo2.write_savanna),
    "mbridge": ("evo2", evo2.write_mbridge),
    "hf": ("esm", esm2.write_hf),
    "fair-esm": ("esm", esm2.write_fair_esm),
    "bionemo-te": ("esm", esm2.write_bionemo_te),
}
"""Formats that can be converted to, beside the native one, with the ``model_type`` that each can hold."""

_PART: Final = re.compile(r"\.part\d+$")
"""Large files are published in pieces with such names."""

_RANK_FILES: Final = "mp_rank_*_model_states.pt"
"""The weights of a training run, beside which much larger optimiser states may lie."""

_FOLDER_FORMATS: Final = frozenset({"hf", "bionemo-te", "mbridge"})
"""Written as a folder; the others are a file, or two."""

_ONLY_FORM: Final[Mapping[str, Parametrization]] = {
    "vortex": "inference",
    "savanna": "training",
    "mbridge": "training",
}
"""Formats that know one form of Evo 2's filters."""


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    source_format: str,
    target_format: str = NATIVE,
    config: str | Path | Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    parametrization: Parametrization | None = None,
) -> Path:
    """Convert a checkpoint and return the destination.

    Args:
        source: file or folder, as the format has it.
        destination: must not exist, or be an empty folder.
        source_format: ``vortex``, ``savanna``, ``mbridge``, ``hf``, ``fair-esm``, ``bionemo-te`` or ``cistron``; or
            ``auto``, which looks at names of files and tensors.
        target_format: the same choice, except ``auto``.
        config: the source's configuration in its own field names, or a JSON or YAML file of it, where the source does
            not say: custom sizes in bare weight files. Cistron's names do for Evo 2 as well.
        trust_pickle: let a pickled source run code. Without it only tensors and a few harmless types are unpickled.
        parametrization: form of Evo 2's filters in the target: ``inference``, or the factors of it that ``training``
            learns. As in the source if not given, or as the target format has it. Training form to inference form is
            exact; the way back gives the same function up to fp32 rounding, not the original factors.

    Raises:
        UnknownNameError: no such format.
        CheckpointNotFoundError: there is nothing at `source`.
        CheckpointError: the source's tensors are not those of its configuration, or it needs `trust_pickle`.
        InputError: the destination exists, or the target format cannot hold this family or form.
    """
    source, destination = Path(source), Path(destination)
    if source_format == AUTO:
        source_format = detect_format(source)
        logger.info("%s looks like %s", source, source_format)
    _check_format("source_format", source_format, READERS)
    _check_format("target_format", target_format, WRITERS)
    if source_format == NATIVE and config is not None:
        raise InputError("config does not apply to source_format cistron, whose config.json says everything")
    _check_form(parametrization, target_format)
    if source_format == NATIVE:
        parsed, tensors = read_config(source), iterate_checkpoint(source)
    else:
        parsed, tensors = READERS[source_format](source, config=_settings(config), trust_pickle=trust_pickle)
    if parametrization is not None:
        parsed, tensors = _in_form(parsed, tensors, parametrization, source)
    if target_format == NATIVE:
        return write_checkpoint(parsed, tensors, destination, provenance=_provenance(source, source_format))
    model_type, write = WRITERS[target_format]
    if parsed.model_type != model_type:
        raise InputError(
            f"target_format {target_format} holds {model_type} models, and {source} is {parsed.model_type}"
        )
    if target_format == "fair-esm":
        esm2.check_beside(destination)
    create = new_directory if target_format in _FOLDER_FORMATS else new_files
    with create(destination) as staging:
        write(parsed, check_tensors(tensors, parsed, source=str(source)), staging)
    return destination


def _check_format(setting: str, name: str, foreign: Mapping[str, Any]) -> None:
    known = [*foreign, NATIVE, *([AUTO] if foreign is READERS else [])]
    if name not in known:
        raise UnknownNameError(f"{setting}: unknown format {name!r}{nearest(name, known)} (known: {', '.join(known)})")


def _check_form(parametrization: Parametrization | None, target_format: str) -> None:
    """Refuse a form that does not exist, or that the target format does not know."""
    if parametrization not in (None, *get_args(Parametrization)):
        known = ", ".join(get_args(Parametrization))
        raise UnknownNameError(f"parametrization: unknown form {parametrization!r} (known: {known})")
    only = _ONLY_FORM.get(target_format)
    if parametrization is not None and only not in (None, parametrization):
        raise InputError(f"parametrization={parametrization}: target_format {target_format} holds the {only} form only")


def _in_form(
    config: ModelConfig, tensors: Tensors, parametrization: Parametrization, source: Path
) -> tuple[ModelConfig, Tensors]:
    if not isinstance(config, Evo2Config):
        raise InputError(f"parametrization applies to evo2 models, and {source} is {config.model_type}")
    return to_form(config, tensors, parametrization)


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
        files = list(source.glob(_RANK_FILES)) or [path for path in source.rglob("*") if path.is_file()]
        root = source
    else:
        root, whole = source.parent, source.with_name(_PART.sub("", source.name))
        files = [whole] if whole.is_file() else list(root.glob(f"{whole.name}.part*"))
    return {
        "source": source.name,
        "source_format": source_format,
        "source_files": {path.relative_to(root).as_posix(): sha256(path) for path in sorted(files)},
    }
