"""ESM-2 checkpoints of other software, read into and written from native tensors.

Everything streams: no function here holds more than a few tensors. Names and shapes are checked before the first tensor
is read, against the configuration. Contact heads and rotary frequencies are kept in every direction.

==========  ====================================================================================  ====================
format      what it is                                                                            written as
==========  ====================================================================================  ====================
fair-esm    Meta's package: ``.pt`` with the contact regression in a ``.pt`` beside it, or         by the name's ending
            safetensors with the metadata key ``config``
hf          Hugging Face: a folder of ``EsmForMaskedLM``, safetensors or pickled, whole or        folder, safetensors
            sharded, of any version of transformers
bionemo-te  BioNeMo's recipes: a folder of ``NVEsmForMaskedLM``, of Transformer Engine's fused    folder, safetensors
            layers, with any padding of the vocabulary
==========  ====================================================================================  ====================
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from cistron.errors import CheckpointNotFoundError, InputError
from cistron.models.esm2 import bionemo_te, fair_esm, hugging_face
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.spelling import (
    CONTACT_HEAD,
    INV_FREQ,
    NamedTensors,
    Spelling,
    TensorStream,
    joined,
    read_native,
    renamed,
    write_foreign,
)
from cistron.models.manifest import read_json
from cistron.models.shards import MAX_SHARD_BYTES, save_safetensors, write_shards
from cistron.models.sources import from_safetensors, json_metadata
from cistron.models.streaming import mapped_tensors, write_safetensors

logger = logging.getLogger(__name__)

Settings: TypeAlias = Mapping[str, Any]

_KNOWN_STEM: Final = "esm2"


def read_fair_esm(source: Path, *, config: Settings | None, trust_pickle: bool) -> tuple[Esm2Config, TensorStream]:
    """Read a fair-esm model: the published ``.pt``, or safetensors with the metadata key ``config``.

    A contact regression beside it (``<stem>-contact-regression.pt`` or ``.safetensors``) is read along.

    Args:
        source: the file.
        config: settings in fair-esm's field names, which take precedence over the file's; what neither says is taken
            from the tensors' shapes.
        trust_pickle: allow a ``.pt`` to run code.

    Returns:
        The configuration, and the native tensors, each loaded when it is asked for.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: a tensor is missing, unexpected or of another shape than the configuration says.
        ConfigError: the configuration is not ESM-2's.
    """
    tensors = renamed(fair_esm.open_fair_esm(source, trust_pickle=trust_pickle), fair_esm.without_prefix, path=source)
    settings = {**json_metadata(tensors, "config", path=source), **(config or {})}
    parsed = fair_esm.config_from_fair_esm(settings, tensors.shapes, path=source)
    return parsed, read_native(tensors, fair_esm.fair_esm_spelling(parsed), parsed, path=source)


def write_fair_esm(config: Esm2Config, tensors: NamedTensors, destination: Path) -> None:
    """Write a model in fair-esm's names: as its own loader reads it if the name ends in ``.pt``, or as safetensors.

    The contact head goes into a ``.pt`` of its own beside the first, or into the safetensors; not if it is all zeros.

    Raises:
        CheckpointError: fair-esm has no place for a feature of `config`.
    """
    settings = fair_esm.config_to_fair_esm(config)
    spelling = fair_esm.fair_esm_spelling(config)
    if destination.suffix == ".pt":
        _write_pickles(settings, spelling, tensors, destination)
        return
    stream = write_foreign(spelling, _without_empty_head(tensors))
    write_safetensors(destination, stream, names=spelling.entries, metadata={"config": json.dumps(settings)})


def check_beside(destination: Path) -> None:
    """Refuse a destination of :func:`write_fair_esm` beside which another model's contact regression stands.

    Raises:
        InputError: it exists.
    """
    beside = fair_esm.regression_file(destination)
    if destination.suffix == ".pt" and beside.exists():
        raise InputError(f"destination {beside}, the contact regression, already exists; remove it or choose another")


def read_hf(source: Path, *, config: Settings | None, trust_pickle: bool) -> tuple[Esm2Config, TensorStream]:
    """Read a Hugging Face ``EsmForMaskedLM`` folder, safetensors or pickled, whole or sharded, of any version.

    Args:
        source: the folder.
        config: settings in ``EsmConfig``'s field names, which take precedence over ``config.json``.
        trust_pickle: allow a ``pytorch_model.bin`` to run code.

    Returns:
        The configuration, and the native tensors, each loaded when it is asked for.

    Raises:
        CheckpointNotFoundError: the folder or one of its files does not exist.
        CheckpointError: a tensor is missing, unexpected or of another shape than the configuration says.
        ConfigError: the configuration is not ESM-2's.
    """
    settings = _folder_settings(source, config)
    parsed = Esm2Config.from_hugging_face(settings)
    opened = hugging_face.open_folder(source, trust_pickle=trust_pickle)
    tensors = renamed(opened, hugging_face.modern_name, path=source)
    hugging_face.check_rotary(settings, tensors.shapes, path=source)
    return parsed, read_native(tensors, hugging_face.hugging_face_spelling(parsed), parsed, path=source)


def write_hf(config: Esm2Config, tensors: NamedTensors, destination: Path) -> None:
    """Write a folder that ``EsmForMaskedLM`` and ``AutoTokenizer`` load: weights, configuration, vocabulary."""
    spelling = hugging_face.hugging_face_spelling(config)
    stream = write_foreign(spelling, tensors)
    write_shards(destination, stream, names=spelling.entries, max_shard_bytes=MAX_SHARD_BYTES)
    hugging_face.write_description(destination, config.to_json())


def read_bionemo_te(source: Path, *, config: Settings | None, trust_pickle: bool) -> tuple[Esm2Config, TensorStream]:
    """Read a folder of BioNeMo's ``NVEsmForMaskedLM``, with or without fused projections and padded vocabulary.

    What the format has no place for is read from the file in which :func:`write_bionemo_te` keeps it. Elsewhere the
    contact head is lost, and the rotary frequencies are those that the software computes.

    Args:
        source: the folder.
        config: settings in ``NVEsmConfig``'s field names, which take precedence over ``config.json``.
        trust_pickle: allow a ``pytorch_model.bin`` to run code.

    Returns:
        The configuration, and the native tensors, each loaded when it is asked for.

    Raises:
        CheckpointNotFoundError: the folder or one of its files does not exist.
        CheckpointError: a tensor is missing, unexpected or of another shape than the configuration says.
        ConfigError: the configuration is not ESM-2's.
    """
    settings = _folder_settings(source, config)
    parsed = bionemo_te.config_from_bionemo_te(settings, path=source)
    opened = hugging_face.open_folder(source, trust_pickle=trust_pickle)
    tensors = renamed(opened, bionemo_te.modern_name, path=source)
    if (source / bionemo_te.EXTRAS).is_file():
        tensors = joined(tensors, from_safetensors([source / bionemo_te.EXTRAS]))
    return parsed, read_native(tensors, bionemo_te.bionemo_te_spelling(parsed, settings), parsed, path=source)


def write_bionemo_te(config: Esm2Config, tensors: NamedTensors, destination: Path) -> None:
    """Write a folder that ``NVEsmForMaskedLM`` loads, and a file of what it has no place for."""
    spelling = bionemo_te.bionemo_te_spelling(config)
    extras: dict[str, torch.Tensor] = {}
    stream = write_foreign(spelling, _set_aside(tensors, extras, (INV_FREQ, *CONTACT_HEAD)))
    write_shards(destination, stream, names=spelling.entries, max_shard_bytes=MAX_SHARD_BYTES)
    save_safetensors(extras, destination / bionemo_te.EXTRAS, metadata={})
    hugging_face.write_description(destination, bionemo_te.config_to_bionemo_te(config))


def _write_pickles(settings: Settings, spelling: Spelling, tensors: NamedTensors, destination: Path) -> None:
    """Write the two files of a published model; tensors with several names are in the first one once."""
    head: dict[str, torch.Tensor] = {}
    kept = _set_aside(_without_empty_head(tensors), head, CONTACT_HEAD)
    stream = write_foreign(spelling, kept, copies=False)
    with mapped_tensors(stream, names=spelling.entries, folder=destination.parent) as stored:
        state: dict[str, torch.Tensor] = {}
        for first, *copies in spelling.written_groups().values():
            if first in stored:
                state |= dict.fromkeys((first, *copies), stored[first])
        torch.save({"cfg": fair_esm.pickled_settings(settings), "model": state}, destination)
    if not head:
        logger.warning(
            "%s: fair-esm's loader wants a contact regression beside it, and there is none", destination.name
        )
        return
    regression = {fair_esm.fair_esm_name(name): tensor for name, tensor in head.items()}
    torch.save({"model": regression}, fair_esm.regression_file(destination))
    if not destination.name.startswith(_KNOWN_STEM):
        logger.warning("%s: fair-esm's loader knows an ESM-2 by a name that begins with esm2", destination.name)


def _folder_settings(source: Path, config: Settings | None) -> dict[str, Any]:
    if not source.is_dir():
        raise CheckpointNotFoundError(f"{source} is not a folder with config.json and weights")
    return {**read_json(source / "config.json"), **(config or {})}


def _set_aside(tensors: NamedTensors, aside: dict[str, torch.Tensor], names: tuple[str, ...]) -> TensorStream:
    """Pass `tensors` on, except for copies of those with `names`, which go to `aside`."""
    for name, tensor in tensors:
        if name in names:
            aside[name] = tensor.detach().clone().contiguous()
        else:
            yield name, tensor


def _without_empty_head(tensors: NamedTensors) -> TensorStream:
    """Leave the contact head out if there is none, which all-zero weights mean; it comes last otherwise."""
    head: dict[str, torch.Tensor] = {}
    yield from _set_aside(tensors, head, CONTACT_HEAD)
    if head[CONTACT_HEAD[0]].any():
        yield from head.items()
