"""Every model that has a name, and how to get one ready to run.

Shapes come from the published configurations; parameter counts are checked against them by a test. ``load_model`` also
decides the precision path, because some published Evo 2 sizes lose their quality without FP8 projections and must not
run that way unnoticed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import torch

from cistron.errors import (
    CapabilityError,
    CheckpointNotFoundError,
    ConfigError,
    UnknownNameError,
    nearest,
)
from cistron.io import storage
from cistron.models import published
from cistron.models.base import SequenceModel
from cistron.models.checkpoint import load_checkpoint, read_config
from cistron.models.evo2.config import Evo2Config
from cistron.models.families import ModelConfig, build, parse_config
from cistron.models.published import ALIASES, ModelSpec

logger = logging.getLogger(__name__)

Precision: TypeAlias = Literal["auto", "bf16", "fp32"]

MODELS_VARIABLE: Final = "CISTRON_MODELS"
"""Environment variable: the folder that holds native checkpoints by registry name."""

_DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SPECS: Final = {spec.name: spec for spec in published.all_specs()}


def list_models() -> list[str]:
    """Return the names of all models in the registry."""
    return list(_SPECS)


def get_spec(name: str) -> ModelSpec:
    """Return the entry of a model.

    Raises:
        UnknownNameError: no such model; the message holds the nearest name.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in _SPECS:
        raise UnknownNameError(f"unknown model {name!r}{nearest(name, _SPECS)} (known: {', '.join(_SPECS)})")
    return _SPECS[canonical]


def config_from(model: str | Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of a registry name, or of a mapping with ``model_type`` and the family's own fields.

    Raises:
        UnknownNameError: no such model.
        ConfigError: the mapping is not a configuration of its family.
    """
    if isinstance(model, str):
        return get_spec(model).config
    return parse_config(model)


def build_model(
    model: str | Mapping[str, Any],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> SequenceModel:
    """Return a model of the shape that `model` names or describes, without trained weights."""
    return build(config_from(model), device=device, dtype=dtype)


def load_model(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    precision: Precision = "auto",
) -> SequenceModel:
    """Return a model with its weights, in eval mode.

    Args:
        source: a native checkpoint's folder or URL, or a registry name whose checkpoint lies in the folder that the
            environment variable ``CISTRON_MODELS`` names.
        device: where the weights go; torch's default device if not given.
        dtype: of the weights; as stored if not given.
        trust_pickle: has no effect on native checkpoints, which hold no pickles; see :func:`convert_checkpoint`.
        precision: ``auto`` runs in the dtype of the weights and refuses a model that is known to degrade there;
            ``bf16`` and ``fp32`` run so whatever the model.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointError: what is there is not a complete native checkpoint.
        UnknownNameError: `source` is neither a path nor a registry name.
        CapabilityError: ``auto``, and the model needs FP8 projections.
        ConfigError: `dtype` and `precision` contradict each other.
    """
    del trust_pickle
    if precision not in get_args(Precision):
        raise ConfigError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    chosen = _DTYPES.get(precision, dtype)
    if dtype not in (None, chosen):
        raise ConfigError(f"precision={precision} and dtype={dtype} contradict each other; give one of them")
    with _local_checkpoint(source) as directory:
        _check_precision(read_config(directory), precision, source)
        model = load_checkpoint(directory, device=device, dtype=chosen)
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    reason = "as asked" if chosen else "as stored"
    logger.info("%s: %s on %s, weights in %s (%s)", source, model.family, model.device, weights, reason)
    return model


def _check_precision(config: ModelConfig, precision: Precision, source: str | Path) -> None:
    """Refuse to run a model without FP8 unnoticed when it is known to need it."""
    if precision == "auto" and isinstance(config, Evo2Config) and config.requires_fp8:
        raise CapabilityError(
            f"{source} was trained with FP8 input projections and is known to degrade without them, and this version "
            "of Cistron has no FP8 path; say precision='bf16' or precision='fp32' to run it anyway"
        )


@contextmanager
def _local_checkpoint(source: str | Path) -> Iterator[Path]:
    """Find the checkpoint that `source` means; one behind a URL is copied here for as long as it is read."""
    if "://" in str(source):
        with tempfile.TemporaryDirectory(prefix="cistron-") as folder:
            yield _downloaded(str(source), Path(folder))
        return
    path = Path(source).expanduser()
    if path.exists():
        yield path
    elif len(path.parts) != 1 or isinstance(source, Path):
        raise CheckpointNotFoundError(f"no checkpoint at {source}")
    else:
        yield _registered(str(source))


def _registered(name: str) -> Path:
    """Return where the checkpoint of a registry name lies."""
    if name not in ALIASES and name not in _SPECS:
        raise UnknownNameError(
            f"{name!r} is neither a folder here nor a model{nearest(name, _SPECS)} (known: {', '.join(_SPECS)})"
        )
    spec = get_spec(name)
    folder = os.environ.get(MODELS_VARIABLE)
    if folder is not None and (Path(folder).expanduser() / spec.name).exists():
        return Path(folder).expanduser() / spec.name
    where = (
        f"{folder}/{spec.name} does not exist" if folder else f"the environment variable {MODELS_VARIABLE} is not set"
    )
    origin = f"; its weights are published at {spec.sources[0]}" if spec.sources else ""
    raise CheckpointNotFoundError(
        f"the weights of {spec.name} are not on this machine: {where}{origin}. Convert them with `cistron convert` "
        f"into ${MODELS_VARIABLE}/{spec.name}, or give load_model the folder"
    )


def _downloaded(url: str, folder: Path) -> Path:
    """Copy the files of a checkpoint at `url` into `folder`."""
    if not storage.is_directory(url):
        raise CheckpointNotFoundError(f"no checkpoint at {url}")
    for file in storage.list_files(url):
        with storage.open_input(file) as source:
            source.download(str(folder / storage.name_of(file)))
    return folder
