"""The Megatron-Bridge spelling of an Evo 2: a distributed checkpoint in Megatron's names, and NeMo 2's with a prefix.

It holds the training form. The two halves of a gated MLP are one tensor, norms are part of the linear map behind them
(or tensors of their own, where the run did without Transformer Engine), and rotary frequencies are not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from cistron.errors import CheckpointError, CheckpointNotFoundError
from cistron.models.dcp import METADATA
from cistron.models.evo2.config import ATTENTION, HCM, HCS, Evo2Config
from cistron.models.evo2.forms import NamedTensors, TensorStream
from cistron.models.evo2.fp8_state import STATE_NAMES
from cistron.models.evo2.initial import exact_rotary_frequencies, rotary_frequencies
from cistron.models.evo2.mbridge_settings import LATEST
from cistron.models.evo2.spelling import Spelling, rows_by_head, rows_by_kind
from cistron.models.sources import TensorSource

_WHOLE: Final = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "final_norm.weight": "decoder.final_norm.weight",
    "unembed.weight": "output_layer.weight",
}
_BLOCK: Final = {
    "mlp_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.gate.weight": "mlp.linear_fc1.weight",
    "mlp.value.weight": "mlp.linear_fc1.weight",
    "mlp.output.weight": "mlp.linear_fc2.weight",
}
_HYENA: Final = {
    "mixer_norm.weight": "mixer.dense_projection.layer_norm_weight",
    "mixer.projection.weight": "mixer.dense_projection.weight",
    **dict.fromkeys(STATE_NAMES, "mixer.dense_projection._extra_state"),
    "mixer.projection_taps": "mixer.hyena_proj_conv.short_conv_weight",
    "mixer.filter.skip": "mixer.mixer.conv_bias",
    "mixer.filter.decay": "mixer.mixer.filter.decay",
    "mixer.filter.gamma": "mixer.mixer.filter.gamma",
    "mixer.filter.residues": "mixer.mixer.filter.R",
    "mixer.filter.p": "mixer.mixer.filter.p",
    "mixer.output.weight": "mixer.dense.weight",
    "mixer.output.bias": "mixer.dense.bias",
}
_TAPS: Final = {HCS: "mixer.mixer.short_conv.short_conv_weight", HCM: "mixer.mixer.filter.h"}
_ATTENTION: Final[Mapping[str, str | None]] = {
    "mixer_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "mixer.qkv.weight": "self_attention.linear_qkv.weight",
    "mixer.output.weight": "self_attention.linear_proj.weight",
    "mixer.output.bias": "self_attention.linear_proj.bias",
    "mixer.rotary.inv_freq": None,
}
_UNFUSED: Final = {
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mixer.dense_projection.layer_norm_weight": "norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
}
"""Names of the norms where they are not part of a linear map."""

_DROPPED: Final = re.compile(
    r"(.*\.)?_extra_state(/.*)?|(optimizer|chained_\d+|opt_param_scheduler|rng_state|rerun_state_machine_state)([./].*)?"
)
"""FP8 states and the state of a training run."""

_HCM_FILTERS: Final = (_TAPS[HCM], _HYENA["mixer.filter.decay"])
_ITERATION: Final = re.compile(r"iter_\d+")
_PREFIX: Final = "module."


def mbridge_spelling(config: Evo2Config, *, fused: bool = True) -> Spelling:
    """Return Megatron-Bridge's names and layouts for the training form of `config`.

    Args:
        config: the model.
        fused: norms are part of the linear map behind them.
    """
    return Spelling(
        name=partial(_name, config, fused),
        encode=partial(_encode, config),
        decode=partial(_decode, config),
        dropped=_DROPPED,
        copies={_WHOLE["unembed.weight"]: _WHOLE["embedding.weight"]} if config.tie_embeddings else {},
    )


def iteration_folder(source: Path) -> Path:
    """Return the folder of tensors that `source` means: itself, its latest iteration, or NeMo 2's ``weights``.

    Raises:
        CheckpointNotFoundError: there is none, or it is not clear which.
    """
    if not source.is_dir():
        raise CheckpointNotFoundError(f"no checkpoint folder at {source}")
    for folder in (source, source / "weights"):
        if (folder / METADATA).is_file():
            return folder
    if (source / LATEST).is_file():
        latest = (source / LATEST).read_text().strip()
        if not latest.isdecimal():
            raise CheckpointError(f"{source / LATEST} must hold a number, got {latest!r}")
        return source / f"iter_{int(latest):07d}"
    found = [path for path in source.iterdir() if _ITERATION.fullmatch(path.name)]
    if len(found) != 1:
        listed = ", ".join(sorted(path.name for path in found)) or "none"
        raise CheckpointNotFoundError(f"{source} has no {LATEST}, and not one iter_* folder but {listed}; name one")
    return found[0]


def without_prefix(source: TensorSource) -> TensorSource:
    """Strip the prefix that NeMo 2 puts before every name."""
    stored = {name.removeprefix(_PREFIX): name for name in source.shapes}
    return replace(
        source,
        shapes={name: source.shapes[old] for name, old in stored.items()},
        load=lambda name: source.load(stored[name]),
        streams={name.removeprefix(_PREFIX): read for name, read in source.streams.items()},
    )


def filter_length(source: TensorSource) -> int | None:
    """Return the length over which HCM's filters are stored; None in a model without them."""
    return next((shape[1] for name, shape in source.shapes.items() if _is_medium(name) and len(shape) > 1), None)


def cut_filters(source: TensorSource, num_taps: int) -> TensorSource:
    """Cut HCM's filters, which may be stored over the training length, to the taps that are used."""

    def load(name: str) -> torch.Tensor:
        tensor = source.load(name)
        return tensor[:, :num_taps] if _is_medium(name) else tensor

    def cut(name: str, shape: torch.Size) -> torch.Size:
        return torch.Size([shape[0], min(shape[1], num_taps)]) if _is_medium(name) and len(shape) > 1 else shape

    return replace(source, load=load, shapes={name: cut(name, shape) for name, shape in source.shapes.items()})


def is_fused(source: TensorSource) -> bool:
    """Return whether norms are part of the linear maps behind them."""
    return f"decoder.layers.0.{_BLOCK['mlp_norm.weight']}" in source.shapes


def frequencies(config: Evo2Config, *, rounded: bool) -> dict[str, torch.Tensor]:
    """Return the rotary frequencies of every attention layer, which the format leaves to whoever reads it."""
    values = rotary_frequencies(config) if rounded else exact_rotary_frequencies(config)
    layers = [index for index, symbol in enumerate(config.layer_pattern) if symbol == ATTENTION]
    return {f"blocks.{index}.mixer.rotary.inv_freq": values for index in layers}


def storable(config: Evo2Config, tensors: NamedTensors, rounded: set[bool]) -> TensorStream:
    """Pass on what the format has a place for, and check that a reader can work out the rotary frequencies.

    Args:
        config: the model, without FP8 scales.
        tensors: native tensors in training form.
        rounded: receives whether the frequencies are rounded to bf16.

    Raises:
        CheckpointError: (from the stream) they are those of no base, or differ between layers.
    """
    for name, tensor in tensors:
        if name.endswith(STATE_NAMES):
            continue
        if not name.endswith("inv_freq"):
            yield name, tensor
            continue
        rounded.add(torch.equal(tensor.float(), rotary_frequencies(config)))
        known = rotary_frequencies(config) if True in rounded else exact_rotary_frequencies(config)
        if len(rounded) > 1 or not torch.equal(tensor.float(), known):
            raise CheckpointError(
                f"{name}: the mbridge format stores no rotary frequencies, and these are not those of rotary_base "
                f"{config.rotary_base:g}"
            )


def _name(config: Evo2Config, fused: bool, native: str) -> str | None:
    if native in _WHOLE:
        return _WHOLE[native]
    _, index, rest = native.split(".", maxsplit=2)
    symbol = config.layer_pattern[int(index)]
    taps = {"mixer.filter.taps": _TAPS[symbol]} if symbol in _TAPS else {}
    table = {**_BLOCK, **(_ATTENTION if symbol == ATTENTION else _HYENA), **taps}
    name = table[rest]
    if name is None:
        return None
    return f"decoder.layers.{index}.{name if fused else _UNFUSED.get(name, name)}"


def _encode(config: Evo2Config, native: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a native tensor in Megatron's layout."""
    if native.endswith("filter.taps") and config.layer_pattern[int(native.split(".")[1])] == HCS:
        return tensor.unsqueeze(1)
    return rows_by_head(config, tensor) if native.endswith("qkv.weight") else tensor


def _decode(config: Evo2Config, native: str, tensor: torch.Tensor) -> torch.Tensor:
    """Undo :func:`_encode`."""
    if native.endswith("filter.taps") and config.layer_pattern[int(native.split(".")[1])] == HCS:
        return tensor.squeeze(1)
    return rows_by_kind(config, tensor) if native.endswith("qkv.weight") else tensor


def _is_medium(name: str) -> bool:
    return name.endswith(_HCM_FILTERS)
