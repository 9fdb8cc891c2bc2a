"""The Hugging Face spelling of an ESM-2: the folder of an ``EsmForMaskedLM``, of any version of transformers.

Native names are those of today's version. The files on the hub are older: they hold the rotary frequencies once per
layer, a table of positions that rotary models never read, and sometimes norms in TensorFlow's spelling. Frequencies are
written per layer too: transformers takes either, and much other software knows only that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from cistron.errors import CheckpointError, ConfigError
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.spelling import CONTACT_HEAD, EMBEDDING, INV_FREQ, Entry, Spelling, weight_names
from cistron.models.esm2.tokenizer_files import TOKENIZER_FILES
from cistron.models.manifest import is_plain_name, read_json
from cistron.models.shards import locate_tensors
from cistron.models.sources import TensorSource, from_safetensors, from_tensors, unpickle

_PICKLED: Final = "pytorch_model.bin"
_PICKLED_INDEX: Final = "pytorch_model.bin.index.json"

_LAYER_INV_FREQ: Final = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
_POSITIONS: Final = "esm.embeddings.position_embeddings.weight"
_UNUSED: Final = re.compile(rf"{re.escape(_POSITIONS)}|esm\.embeddings\.position_ids|esm\.pooler\.dense\.(weight|bias)")
"""A table of positions, the row numbers of it, and a layer that only the bare encoder's class has."""


def hugging_face_spelling(config: Esm2Config) -> Spelling:
    """Return the tensors of an ``EsmForMaskedLM``, old or new.

    transformers 5.23 writes the rotary frequencies under a name with a literal ``*``.
    """
    entries = {name: Entry((name,)) for name in weight_names(config)}
    for i in range(config.num_layers):
        entries[_LAYER_INV_FREQ.format(i)] = Entry((INV_FREQ,), required=False)
    entries |= {name: Entry((name,), required=False) for name in CONTACT_HEAD}
    read_only = {
        INV_FREQ: INV_FREQ,
        _LAYER_INV_FREQ.format("*"): INV_FREQ,
        "lm_head.decoder.weight": EMBEDDING,
        "lm_head.decoder.bias": "lm_head.bias",
    }
    entries |= {name: Entry((native,), required=False, written=False) for name, native in read_only.items()}
    return Spelling(entries, unused=_UNUSED)


def modern_name(name: str) -> str:
    """Undo spellings of the past: TensorFlow's of norms, which 5.23 writes again, and a contact head at the top."""
    name = re.sub(r"(?<=\.)(gamma|beta)$", lambda match: {"gamma": "weight", "beta": "bias"}[match[1]], name)
    return f"esm.{name}" if name.startswith("contact_head.") else name


def check_rotary(settings: Mapping[str, Any], names: Collection[str], *, path: Path) -> None:
    """Refuse a relative of ESM-2 whose positions are a table that is read.

    Raises:
        ConfigError: there is a table, and no word about the kind of positions, which then are absolute.
    """
    if _POSITIONS in names and settings.get("position_embedding_type") is None:
        raise ConfigError(
            f"{path}: the weights hold {_POSITIONS}, and the configuration does not say position_embedding_type, whose "
            'default is "absolute": this is no ESM-2. If it is one, pass config= with position_embedding_type: rotary'
        )


def open_folder(folder: Path, *, trust_pickle: bool) -> TensorSource:
    """Open the weights of a folder, whole or sharded; safetensors are preferred to pickles.

    Raises:
        CheckpointNotFoundError: a file is missing.
        CheckpointError: a file is broken, holds something else, or needs `trust_pickle`.
    """
    if not any(folder.glob("pytorch_model*.bin")) or any(folder.glob("model*.safetensors")):
        return from_safetensors([folder / file for file in locate_tensors(folder)])
    tensors: dict[str, torch.Tensor] = {}
    for path in _pickled_files(folder):
        state = unpickle(path, trust_pickle=trust_pickle)
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise CheckpointError(f"{path} must hold a mapping of tensors")
        tensors |= state
    return from_tensors(tensors)


def write_description(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the files beside the weights: configuration, and vocabulary for ``AutoTokenizer``."""
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for name, text in TOKENIZER_FILES.items():
        (folder / name).write_text(text)


def _pickled_files(folder: Path) -> list[Path]:
    if not (folder / _PICKLED_INDEX).exists():
        return [folder / _PICKLED]
    weight_map = read_json(folder / _PICKLED_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(is_plain_name(file) for file in weight_map.values()):
        raise CheckpointError(f"{folder / _PICKLED_INDEX}: 'weight_map' must map tensor names to files of this folder")
    return [folder / file for file in sorted(set(weight_map.values()))]
