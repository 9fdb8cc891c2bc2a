"""Tensor names of ESM-2 in fair-esm's and Hugging Face's files, mapped to ours.

Ours are Hugging Face's of today. Both dialects store some tensors more than once (the tied embedding, one copy of the
rotary frequencies per layer), so a map may send several names to one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2

EMBEDDING: Final = "esm.embeddings.word_embeddings.weight"
INV_FREQ: Final = "esm.rotary_embeddings.inv_freq"
CONTACT_HEAD: Final = ("esm.contact_head.regression.weight", "esm.contact_head.regression.bias")

FAIR_ESM_TIED: Final = "lm_head.weight"
FAIR_ESM_PREFIXES: Final = ("encoder.sentence_encoder.", "encoder.")
"""What fair-esm's own loader strips from the names in its ``.pt`` files."""

_FAIR_ESM_MODULES: Final = {
    "esm.embeddings.word_embeddings": "embed_tokens",
    "esm.encoder.layer.{}.attention.LayerNorm": "layers.{}.self_attn_layer_norm",
    "esm.encoder.layer.{}.attention.self.query": "layers.{}.self_attn.q_proj",
    "esm.encoder.layer.{}.attention.self.key": "layers.{}.self_attn.k_proj",
    "esm.encoder.layer.{}.attention.self.value": "layers.{}.self_attn.v_proj",
    "esm.encoder.layer.{}.attention.output.dense": "layers.{}.self_attn.out_proj",
    "esm.encoder.layer.{}.LayerNorm": "layers.{}.final_layer_norm",
    "esm.encoder.layer.{}.intermediate.dense": "layers.{}.fc1",
    "esm.encoder.layer.{}.output.dense": "layers.{}.fc2",
    "esm.encoder.emb_layer_norm_after": "emb_layer_norm_after",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
    "lm_head": "lm_head",
    "esm.contact_head.regression": "contact_head.regression",
}

_HF_INV_FREQ: Final = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
_HF_IGNORED: Final = frozenset({"esm.embeddings.position_embeddings.weight", "esm.embeddings.position_ids"})
"""A position table that rotary models never read, and the row numbers of it."""


@dataclass(frozen=True, slots=True)
class NameMap:
    """Which names a file must or may hold, and what they are to us.

    Attributes:
        required: names that must be there, each with its native name.
        optional: names that may be there, each with its native name.
        ignored: names that may be there and mean nothing.
    """

    required: dict[str, str]
    optional: dict[str, str]
    ignored: frozenset[str] = frozenset()


def fair_esm_name(native: str) -> str:
    """Return fair-esm's name of a native tensor other than the rotary frequencies.

    >>> fair_esm_name("esm.encoder.layer.7.intermediate.dense.bias")
    'layers.7.fc1.bias'
    """
    module, _, kind = native.rpartition(".")
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", module)
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", module)
    return f"{_FAIR_ESM_MODULES[pattern].format(*numbers)}.{kind}"


def fair_esm_inv_freq(config: Esm2Config) -> list[str]:
    """Return fair-esm's names of its copies of the rotary frequencies."""
    return [f"layers.{i}.self_attn.rot_emb.inv_freq" for i in range(config.num_layers)]


def fair_esm_names(config: Esm2Config) -> NameMap:
    """Return the names of a fair-esm file; the contact regression is published as a file of its own."""
    required = {fair_esm_name(name): name for name in _weights(config)}
    required |= {FAIR_ESM_TIED: EMBEDDING, **dict.fromkeys(fair_esm_inv_freq(config), INV_FREQ)}
    return NameMap(required=required, optional={fair_esm_name(name): name for name in CONTACT_HEAD})


def hugging_face_names(config: Esm2Config) -> NameMap:
    """Return the names of a Hugging Face file, old or new.

    Old files hold the rotary frequencies per layer; transformers 5.23 writes them under a name with a literal ``*``.
    """
    copies = [_HF_INV_FREQ.format(i) for i in [*range(config.num_layers), "*"]]
    optional = {name: name for name in (*CONTACT_HEAD, INV_FREQ)}
    optional |= {"lm_head.decoder.weight": EMBEDDING, **dict.fromkeys(copies, INV_FREQ)}
    return NameMap(required={name: name for name in _weights(config)}, optional=optional, ignored=_HF_IGNORED)


def modern_hugging_face_name(name: str) -> str:
    """Undo the TensorFlow spelling of norms, which old files have and transformers 5.23 writes again."""
    return re.sub(r"(?<=\.LayerNorm\.)(gamma|beta)$", lambda m: {"gamma": "weight", "beta": "bias"}[m[1]], name)


def _weights(config: Esm2Config) -> Iterable[str]:
    """Return the native names of what every file of the model must hold."""
    names = Esm2(config, device="meta").state_dict()
    return [name for name in names if name not in (INV_FREQ, *CONTACT_HEAD)]
