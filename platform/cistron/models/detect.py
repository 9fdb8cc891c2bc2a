"""The format of a checkpoint, told by what its files look like.

Nothing is unpickled: tensor names stand readable at the beginning of every kind of weight file, in the header of
safetensors and in the pickle of a ``.pt``, which precedes the numbers also in the first part of a file cut into parts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from cistron.errors import CheckpointError, CheckpointNotFoundError
from cistron.models.dcp import METADATA
from cistron.models.manifest import MANIFEST, read_json

AUTO: Final = "auto"
"""Asks for the format to be told by :func:`detect_format`."""

NATIVE: Final = "cistron"

_BY_MODEL_TYPE: Final = {"esm": "hf", "nv_esm": "bionemo-te"}
_BY_FILE: Final = (
    (MANIFEST, NATIVE),
    ("mp_rank_*_model_states.pt", "savanna"),
    (METADATA, "mbridge"),
    (f"weights/{METADATA}", "mbridge"),
    ("latest_checkpointed_iteration.txt", "mbridge"),
    ("iter_*", "mbridge"),
)
"""Names of files that only one format's folders have; the native one is looked for first."""

_BY_TENSOR: Final = (
    (re.compile(rb"\blayers\.\d+\.self_attn\.rot_emb\.inv_freq"), "fair-esm"),
    (re.compile(rb"\bsequential\.\d+\."), "savanna"),
    (re.compile(rb"\bblocks\.\d+\.(pre_norm|post_norm|mlp\.l[123]|projections|filter|inner_mha_cls)\b"), "vortex"),
)
_WEIGHT_FILE: Final = re.compile(r".*\.(safetensors|pt|pt\.part0)")
_PART: Final = re.compile(r"(?<=\.pt)\.part\d+$")
_READ_BYTES: Final = 1 << 24
"""More than any published model's names and settings take."""


def detect_format(source: Path) -> str:
    """Return the format of the checkpoint at `source`; of one in parts, any ``.pt.partN`` or the name without it.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointError: it is like none of the formats.
    """
    whole = _PART.sub("", source.name)
    first_part = source.with_name(f"{whole}.part0")
    if first_part.exists() and not source.with_name(whole).exists():
        source = first_part
    if not source.exists():
        raise CheckpointNotFoundError(f"{source} does not exist")
    found = _format_of_folder(source) if source.is_dir() else _format_of_file(source)
    if found is None:
        raise CheckpointError(f"cannot tell the format of {source} by its files; say source_format")
    return found


def _format_of_folder(folder: Path) -> str | None:
    for pattern, name in _BY_FILE:
        if any(folder.glob(pattern)):
            return name
    if (folder / "config.json").is_file():
        # Published Evo 2 weights have one beside them that says nothing of their format.
        model_type = str(read_json(folder / "config.json").get("model_type"))
        if model_type in _BY_MODEL_TYPE:
            return _BY_MODEL_TYPE[model_type]
    formats = {_format_of_file(path) for path in folder.iterdir() if _WEIGHT_FILE.fullmatch(path.name)}
    return formats.pop() if len(formats) == 1 else None


def _format_of_file(path: Path) -> str | None:
    with path.open("rb") as stream:
        start = stream.read(_READ_BYTES)
    return next((name for sign, name in _BY_TENSOR if sign.search(start)), None)
