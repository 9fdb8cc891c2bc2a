"""The savanna spelling of an Evo 2: the names, layouts and cuts of the software that trained the released models.

savanna holds the training form. Its HCM filters span the training length, of which only the first taps are ever used;
the rest is dropped, and written as zeros. Layer i stands at place i + 2 of a flat sequence of modules; the final norm
follows the last layer after one further place that holds nothing, or (one released size) directly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from cistron.errors import CheckpointError
from cistron.models.evo2.config import ATTENTION, HCM, HCS, Evo2Config
from cistron.models.evo2.fp8_state import STATE_NAMES
from cistron.models.evo2.initial import rotary_frequencies
from cistron.models.evo2.spelling import Spelling, rows_by_head, rows_by_kind
from cistron.models.sources import TensorSource

_ROWS, _COLUMNS = 0, 1
"""Dimensions along which model-parallel ranks cut a tensor."""

_FIRST_LAYER: Final = 2
_NORM_PLACES: Final = (3, 2)
"""Where the final norm stands, counted from the number of layers; the first is written."""

_BLOCK: Final[Mapping[str, tuple[str, int | None]]] = {
    "mixer_norm.weight": ("input_layernorm.weight", None),
    "mlp_norm.weight": ("pre_mlp_layernorm.weight", None),
    "mlp.gate.weight": ("mlp.w1.weight", _ROWS),
    "mlp.value.weight": ("mlp.w2.weight", _ROWS),
    "mlp.output.weight": ("mlp.w3.weight", _COLUMNS),
    "mixer.output.weight": ("mixer.dense.weight", _COLUMNS),
    "mixer.output.bias": ("mixer.dense.bias", None),
}
_HYENA: Final[Mapping[str, tuple[str, int | None]]] = {
    "mixer.projection.weight": ("mixer.dense_projection.weight", _ROWS),
    **dict.fromkeys(STATE_NAMES, ("mixer.dense_projection._extra_state", None)),
    "mixer.projection_taps": ("mixer.hyena_proj_conv.short_conv_weight", _ROWS),
    "mixer.filter.skip": ("mixer.mixer.conv_bias", _ROWS),
    "mixer.filter.decay": ("mixer.mixer.filter.decay", _ROWS),
    "mixer.filter.gamma": ("mixer.mixer.filter.gamma", _ROWS),
    "mixer.filter.residues": ("mixer.mixer.filter.R", _ROWS),
    "mixer.filter.p": ("mixer.mixer.filter.p", _ROWS),
}
_TAPS: Final[Mapping[str, tuple[str, int | None]]] = {
    HCS: ("mixer.mixer.short_conv.short_conv_weight", _ROWS),
    HCM: ("mixer.mixer.filter.h", _ROWS),
}
_ATTENTION: Final[Mapping[str, tuple[str, int | None]]] = {
    "mixer.qkv.weight": ("mixer.dense_projection.weight", _ROWS),
    "mixer.rotary.inv_freq": ("mixer.rotary_emb.inv_freq", None),
}
_WHOLE: Final[Mapping[str, tuple[str, int | None]]] = {
    "embedding.weight": ("word_embeddings.weight", _ROWS),
    "final_norm.weight": ("norm.weight", None),
    "unembed.weight": ("final_linear.weight", _ROWS),
}
"""Native name to savanna's, without the place in the sequence, and the dimension that ranks cut."""

_AXES: Final = dict([*_BLOCK.values(), *_HYENA.values(), *_TAPS.values(), *_ATTENTION.values(), *_WHOLE.values()])

_DROPPED: Final = re.compile(
    r"(.*\.)?_extra_state|sequential\.\d+\.((post_attention|outer_mlp)_layernorm\.weight|mixer\.mixer\.filter\.t)"
)
"""FP8 states, norms that no model uses, and a range of integers."""

_KNOWN_BASES: Final = (1e4, 1e6)
"""Rotary bases of the released models. Settings of later training stages name others that never took effect."""


def savanna_spelling(config: Evo2Config, norm_place: int = _NORM_PLACES[0]) -> Spelling:
    """Return savanna's names and layouts for the training form of `config`.

    Args:
        config: the model, whose ``filter_cache_length`` is the length of the stored HCM filters.
        norm_place: where the final norm stands, counted from the number of layers.
    """
    return Spelling(
        name=partial(_name, config, norm_place),
        encode=partial(_encode, config),
        decode=partial(_decode, config),
        dropped=_DROPPED,
    )


def norm_place(config: Evo2Config, source: TensorSource) -> int:
    """Return where the final norm stands in a file; a missing one is reported later."""
    for place in _NORM_PLACES:
        if f"sequential.{config.num_layers + place}.norm.weight" in source.shapes:
            return place
    return _NORM_PLACES[0]


def cut_axis(name: str) -> int | None:
    """Return the dimension along which model-parallel ranks cut a tensor; None for one that each holds whole."""
    return _AXES.get(name.split(".", maxsplit=2)[-1])


def state_dict_of(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Find the state dict in what a file holds: under ``module`` or at the top, with or without a wrapper's prefix."""
    inner = content.get("module")
    found = inner if isinstance(inner, Mapping) else content
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def with_stored_lengths(config: Evo2Config, source: TensorSource, path: Path) -> Evo2Config:
    """Return `config` with the length of the HCM filters, and the rotary base, that a file really has.

    Raises:
        CheckpointError: the filters are shorter than the taps that are used.
    """
    updates: dict[str, Any] = {}
    for name, shape in source.shapes.items():
        if name.endswith(_TAPS[HCM][0]) and len(shape) > 1:
            updates["filter_cache_length"] = shape[1]
            if shape[1] < config.hcm_filter_length:
                raise CheckpointError(f"{path}: {name} has {shape[1]} taps, the model uses {config.hcm_filter_length}")
        elif name.endswith(_ATTENTION["mixer.rotary.inv_freq"][0]) and "rotary_base" not in updates:
            updates["rotary_base"] = _effective_base(config, source.load(name))
    return config.model_copy(update=updates)


def _name(config: Evo2Config, norm_place: int, native: str) -> str:
    if native in _WHOLE:
        place = {"embedding.weight": 0, "unembed.weight": config.num_layers + norm_place + 1}
        return f"sequential.{place.get(native, config.num_layers + norm_place)}.{_WHOLE[native][0]}"
    _, index, rest = native.split(".", maxsplit=2)
    symbol = config.layer_pattern[int(index)]
    taps = {"mixer.filter.taps": _TAPS[symbol]} if symbol in _TAPS else {}
    table = {**_BLOCK, **(_ATTENTION if symbol == ATTENTION else _HYENA), **taps}
    return f"sequential.{int(index) + _FIRST_LAYER}.{table[rest][0]}"


def _encode(config: Evo2Config, native: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a native tensor in savanna's layout."""
    if _is_medium(config, native):
        return functional.pad(tensor, (0, config.filter_cache_length - tensor.shape[1]))
    if native.endswith("filter.taps"):
        return tensor.unsqueeze(1)
    return rows_by_head(config, tensor) if native.endswith("qkv.weight") else tensor


def _decode(config: Evo2Config, native: str, tensor: torch.Tensor) -> torch.Tensor:
    """Undo :func:`_encode`."""
    if _is_medium(config, native):
        return tensor[:, : config.hcm_filter_length]
    if native.endswith("filter.taps"):
        return tensor.squeeze(1)
    return rows_by_kind(config, tensor) if native.endswith("qkv.weight") else tensor


def _is_medium(config: Evo2Config, native: str) -> bool:
    """Return whether a tensor is HCM's filter or its decay, which savanna stores over the whole training length."""
    return native.endswith((".taps", ".decay")) and config.layer_pattern[int(native.split(".")[1])] == HCM


def _effective_base(config: Evo2Config, inv_freq: torch.Tensor) -> float:
    """Return the base whose frequencies a file holds; the settings' where no known one has them."""
    for base in (config.rotary_base, *_KNOWN_BASES):
        frequencies = rotary_frequencies(config.model_copy(update={"rotary_base": base}))
        if torch.equal(inv_freq.bfloat16().float(), frequencies):
            return base
    return config.rotary_base
