"""Evo 2 checkpoints of other software, read into and written from native tensors.

Everything streams: no function here holds more than a few tensors. Names and shapes are checked before the first tensor
is read, against the configuration, whose source is (in this order) the caller, the file's own notes, or the published
model that the file is named after.

========  =====================================================================================  ==============
format    what it is                                                                             form of filters
========  =====================================================================================  ==============
vortex    Arc Institute's inference software: ``.pt`` (whole or in parts) or safetensors          inference
savanna   the software that trained the models: ``.pt`` (whole, in parts, or one file per rank)   training
mbridge   Megatron-Bridge and NeMo 2: a folder of ``torch.distributed.checkpoint``                training
========  =====================================================================================  ==============
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from cistron.errors import ConfigError
from cistron.models.dcp import from_dcp, write_dcp
from cistron.models.evo2 import mbridge, mbridge_settings, savanna, savanna_settings, vortex
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.forms import NamedTensors, TensorStream, to_inference_form, to_training_form
from cistron.models.evo2.fp8_need import with_known_need
from cistron.models.evo2.ranks import open_ranks, rank_files
from cistron.models.evo2.settings import is_native
from cistron.models.evo2.spelling import Spelling, read_native, stored_scales
from cistron.models.evo2.weight_files import open_weights
from cistron.models.evo2.written_files import mapped, write_file
from cistron.models.published import all_specs
from cistron.models.sources import TensorSource, json_metadata

logger = logging.getLogger(__name__)

Settings: TypeAlias = Mapping[str, Any]

_INFERENCE: Final = {"parametrization": "inference"}
_TRAINING: Final = {"parametrization": "training", "norm_eps_inside": True}
"""What software that trains has in common: factors of filters, and epsilon under the root of the norm."""

_ITERATION: Final = 1


def read_vortex(source: Path, *, config: Settings | None, trust_pickle: bool) -> tuple[Evo2Config, TensorStream]:
    """Read a vortex checkpoint: safetensors with the metadata key ``config``, or a ``.pt``, whole or in parts.

    Args:
        source: the file, one of its ``.pt.partN``, or a folder that holds nothing else of these kinds.
        config: settings in vortex's field names, which take precedence over the file's; or in ours.
        trust_pickle: allow a ``.pt`` to run code.

    Returns:
        The configuration, and the native tensors as stored, each loaded when it is asked for.

    Raises:
        CheckpointNotFoundError: no such file, or a part is missing.
        CheckpointError: a tensor is missing, unexpected or of another shape than the configuration says.
        ConfigError: the configuration is incomplete or not an Evo 2's.
    """
    path, tensors = open_weights(source, trust_pickle=trust_pickle)
    noted = json_metadata(tensors, "config", path=path)

    def parse(settings: Settings) -> Evo2Config:
        return vortex.config_from_vortex(settings, source=path)

    parsed = _configuration(config, noted, path, parse, _INFERENCE)
    return _read(parsed, vortex.vortex_spelling, tensors, path)


def write_vortex(config: Evo2Config, tensors: NamedTensors, destination: Path) -> None:
    """Write native tensors as a safetensors file in vortex's names and layout, with its settings as metadata.

    A destination that ends in ``.pt`` becomes a pickled state dict, the only kind that vortex itself reads; that has no
    place for the settings, which vortex takes from a YAML file.

    The training form is converted to the inference form on the way: vortex knows no other.

    Raises:
        CheckpointError: vortex has no place for a feature of `config`.
    """
    config, tensors = to_inference_form(config, tensors)
    if config.norm_eps_inside:
        logger.info("vortex adds norm_eps outside the root, this model under it")
    settings = vortex.config_to_vortex(config)
    write_file(config, vortex.vortex_spelling(config), tensors, destination, settings)


def read_savanna(source: Path, *, config: Settings | None, trust_pickle: bool) -> tuple[Evo2Config, TensorStream]:
    """Read a savanna checkpoint: a ``.pt`` or safetensors, a ``.pt`` in parts, or the files of all parallel ranks.

    Args:
        source: as for :func:`read_vortex`, or a folder of ``mp_rank_XX_model_states.pt``.
        config: settings in savanna's field names, or in ours.
        trust_pickle: allow a ``.pt`` to run code.

    Returns:
        The configuration, and the native tensors in training form.

    Raises:
        CheckpointNotFoundError: no such file, or a part or a rank is missing.
        CheckpointError: as :func:`read_vortex`, or ranks that do not fit together.
        ConfigError: the configuration is incomplete or not an Evo 2's.
    """
    if rank_files(source):
        path, unwrap = source, savanna.state_dict_of
        tensors = open_ranks(source, savanna.cut_axis, trust_pickle=trust_pickle, unwrap=unwrap)
    else:
        path, tensors = open_weights(source, trust_pickle=trust_pickle, unwrap=savanna.state_dict_of)
    noted = json_metadata(tensors, "config", path=path)

    def parse(settings: Settings) -> Evo2Config:
        return savanna_settings.config_from_savanna(settings, tensors, path=path)

    parsed = _configuration(config, noted, path, parse, _TRAINING)
    parsed = savanna.with_stored_lengths(parsed, tensors, path)
    _note_unused_taps(parsed, path)
    place = savanna.norm_place(parsed, tensors)
    return _read(parsed, lambda found: savanna.savanna_spelling(found, place), tensors, path)


def write_savanna(config: Evo2Config, tensors: NamedTensors, destination: Path) -> None:
    """Write native tensors as savanna's ``.pt``, or as safetensors with its settings as metadata, by the name's end.

    The inference form is converted to a training form of the same function on the way; see ``forms``.

    Raises:
        CheckpointError: savanna has no place for a feature of `config`.
    """
    settings = savanna_settings.config_to_savanna(config)
    config, tensors = _trainable(config, tensors)
    write_file(config, savanna.savanna_spelling(config), tensors, destination, settings, key="module")


def read_mbridge(source: Path, *, config: Settings | None, trust_pickle: bool) -> tuple[Evo2Config, TensorStream]:
    """Read a Megatron-Bridge or NeMo 2 checkpoint.

    Args:
        source: the folder of all iterations, of one, or NeMo 2's.
        config: settings in the field names of BioNeMo's model provider (or a ``run_config.yaml`` of them), which take
            precedence over those beside the tensors; or in ours.
        trust_pickle: allow the checkpoint's ``.metadata`` to run code.

    Returns:
        The configuration, and the native tensors in training form.

    Raises:
        CheckpointNotFoundError: no such folder, or a file of it is missing.
        CheckpointError: as :func:`read_vortex`.
        ConfigError: the configuration is incomplete or not an Evo 2's.
    """
    folder = mbridge.iteration_folder(source)
    tensors = mbridge.without_prefix(from_dcp(folder, trust_pickle=trust_pickle))
    given = mbridge_settings.model_settings(config) if config else {}
    noted = mbridge_settings.read_run_config(folder)

    def parse(settings: Settings) -> Evo2Config:
        length = mbridge.filter_length(tensors)
        stored = {"filter_cache_length": length} if length else {}
        return mbridge_settings.config_from_mbridge({**stored, **settings}, tensors, path=folder)

    parsed = _configuration(given, noted, source, parse, _TRAINING)
    _note_unused_taps(parsed, folder)
    fused = mbridge.is_fused(tensors)
    tensors = mbridge.cut_filters(tensors, parsed.hcm_filter_length)
    parsed, stream = _read(parsed, lambda found: mbridge.mbridge_spelling(found, fused=fused), tensors, folder)
    rounded = mbridge_settings.rounds_frequencies({**noted, **given}, parsed)
    logger.info(
        "%s: the format stores no rotary frequencies; taking those %s",
        folder,
        "rounded to bf16" if rounded else "of fp32",
    )
    return parsed, _followed_by(stream, mbridge.frequencies(parsed, rounded=rounded))


def write_mbridge(config: Evo2Config, tensors: NamedTensors, destination: Path) -> None:
    """Write native tensors into the existing folder `destination` as a Megatron-Bridge checkpoint.

    Its software finds weights and the model's settings there, and takes those of training from its own recipe.

    Raises:
        CheckpointError: (from the stream) the rotary frequencies are none that the format's readers could know.
    """
    config, tensors = _trainable(config, tensors)
    if config.fp8_scales:
        logger.warning("dropping the FP8 scales, for which mbridge has no place of its own")
    plain = config.model_copy(update={"fp8_scales": False})
    rounded: set[bool] = set()
    kept = mbridge.storable(plain, tensors, rounded)
    with mapped(plain, mbridge.mbridge_spelling(plain), kept, destination) as stored:
        mbridge_settings.write_run_files(destination, _ITERATION)
        folder = destination / f"iter_{_ITERATION:07d}"
        write_dcp(folder, stored)
    text = mbridge_settings.run_config(plain, round_inv_freq=rounded != {False})
    (folder / mbridge_settings.RUN_CONFIG).write_text(text)


def _read(
    config: Evo2Config, spelling_of: Callable[[Evo2Config], Spelling], tensors: TensorSource, path: Path
) -> tuple[Evo2Config, TensorStream]:
    """Return the configuration with what only the tensors say, and the native tensors."""
    scales = stored_scales(config, spelling_of(config), tensors, path)
    config = config.model_copy(update={"fp8_scales": scales is not None})
    return config, read_native(config, spelling_of(config), tensors, path=path, scales=scales)


def _followed_by(tensors: TensorStream, more: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tensors
    yield from more.items()


def _note_unused_taps(config: Evo2Config, path: Path) -> None:
    """Say that a part of the filters that no layer reads does not come along."""
    if config.filter_cache_length > config.hcm_filter_length:
        logger.info(
            "%s: HCM filters are stored over %d tokens, of which the model uses %d; the rest is not kept, and zeros "
            "are written for it",
            *(path, config.filter_cache_length, config.hcm_filter_length),
        )


def _trainable(config: Evo2Config, tensors: NamedTensors) -> tuple[Evo2Config, TensorStream]:
    """Return the training form, and say what it cannot bring back."""
    if config.parametrization == "inference":
        logger.warning("the factors of the filters are not known; writing ones of the same function")
    if not config.norm_eps_inside:
        logger.info("the format's software adds norm_eps under the root, this model outside it")
    return to_training_form(config, tensors)


def _configuration(
    given: Settings | None,
    noted: Settings,
    path: Path,
    parse: Callable[[Settings], Evo2Config],
    format_is: Settings,
) -> Evo2Config:
    """Return the configuration from the caller, the file's notes, or the published model of the file's name."""
    if given and is_native(given):
        config = Evo2Config.from_json({**format_is, **given, "parametrization": format_is["parametrization"]})
        return with_known_need(config, given, path)
    if settings := {**noted, **(given or {})}:
        return with_known_need(parse(settings), settings, path)
    name = path.name.partition(".")[0].removeprefix("savanna_")
    published = {spec.name: spec.config for spec in all_specs()}.get(name)
    if not isinstance(published, Evo2Config):
        raise ConfigError(
            f"{path} says nothing about its configuration and is not named after a published model; pass config= with "
            "a mapping or file of settings, in the format's field names or Cistron's (hidden_size, layer_pattern, ...)"
        )
    return published.model_copy(update=format_is)
