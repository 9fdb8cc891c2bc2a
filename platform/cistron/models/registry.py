"""Every model that has a name, and how to get one ready to run.

Shapes come from the published configurations; parameter counts are checked against them by a test. ``load_model`` also
takes the precision path that ``precision`` plans, because some published Evo 2 sizes lose their quality without FP8
projections and must not run that way unnoticed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, get_args

import torch

from cistron.errors import CapabilityError, CheckpointNotFoundError, ConfigError, UnknownNameError, nearest
from cistron.io import storage
from cistron.models import published
from cistron.models.base import SequenceModel
from cistron.models.checkpoint import CONFIG, load_checkpoint, read_config
from cistron.models.families import ModelConfig, build, parse_config
from cistron.models.layers.fp8 import set_fp8_path
from cistron.models.layers.int8 import quantize_linears
from cistron.models.manifest import MANIFEST, read_manifest
from cistron.models.precision import DTYPES, Plan, plan_precision
from cistron.models.precision import Precision as Precision
from cistron.models.published import ALIASES, ModelSpec

logger = logging.getLogger(__name__)

MODELS_VARIABLE: Final = "CISTRON_MODELS"
"""Environment variable: the folder that holds native checkpoints by registry name."""

_SHORT: Final = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
_SPECS: Final = {spec.name: spec for spec in published.all_specs()}
_NAMES: Final = (*_SPECS, *ALIASES)


def list_models() -> list[str]:
    """Return the names of all models in the registry."""
    return list(_SPECS)


def get_spec(name: str) -> ModelSpec:
    """Return the entry of a model.

    Raises:
        UnknownNameError: no such model; the message holds the nearest name.
    """
    canonical = ALIASES.get(name, name)
    _refuse_unpublished(name)
    if canonical not in _SPECS:
        raise UnknownNameError(f"unknown model {name!r}{nearest(name, _NAMES)} (known: {', '.join(_SPECS)})")
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
        precision: ``auto`` takes the best path that is known to be good for the model on `device`: the dtype of the
            weights, or FP8 input projections on hardware that has them. ``bf16``, ``fp32``, ``fp8``, ``fp8_emulated``
            and ``fp8_hopper_emulated`` run so whatever the model. ``int8`` is for the linear layers of ESM-2 on a CPU;
            the log says how far its logits are from those in fp32. FP8 and int8 are for inference only.

    Returns:
        The model; ``precision_path`` and ``precision_reason`` say which path it took, and so does the log.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointError: what is there is not a complete native checkpoint.
        UnknownNameError: `source` is neither a path nor a registry name.
        CapabilityError: ``auto``, and every path that is possible here is known to degrade the model or untested;
            or ``fp8`` without such hardware, or ``int8`` elsewhere than on a CPU; or no such device is here.
        ConfigError: `dtype` and `precision` contradict each other, or the model has nothing that the path is for.
    """
    del trust_pickle
    if precision not in get_args(Precision):
        raise ConfigError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if dtype not in (None, DTYPES.get(precision, dtype)):
        raise ConfigError(f"precision={precision} and dtype={dtype} contradict each other; give one of them")
    target = torch.device(device) if device is not None else torch.get_default_device()
    if target.type == "cuda" and not torch.cuda.is_available():
        raise CapabilityError(f"device {target}: this machine has no CUDA device that PyTorch {torch.__version__} sees")
    with _local_checkpoint(source) as directory:
        config = read_config(directory)
        plan = plan_precision(config, precision, dtype=dtype, device=target, source=str(source))
        model = load_checkpoint(directory, device=target, dtype=plan.dtype)
    return _on_path(model, plan, source)


def describe_checkpoint(source: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the configuration and the manifest of the checkpoint that `source` means, without reading its weights.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointError: what is there is not a native checkpoint.
        UnknownNameError: `source` is neither a path nor a registry name.
    """
    with _local_checkpoint(source, only=(CONFIG, MANIFEST)) as directory:
        return read_config(directory), read_manifest(directory)


def _on_path(model: SequenceModel, plan: Plan, source: str | Path) -> SequenceModel:
    """Let `model` run as planned, and say so."""
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    set_fp8_path(model, plan.fp8)
    reason = plan.reason if plan.path != "int8" else f"{plan.reason}; {quantize_linears(model)}"
    model.precision_path = plan.path or _SHORT.get(weights, weights)
    model.precision_reason = reason
    path = f"precision path {model.precision_path}, weights in {weights}"
    logger.info("%s: %s on %s, %s (%s)", source, model.family, model.device, path, reason)
    if plan.warning:
        logger.warning("%s: precision path %s: %s", source, model.precision_path, plan.warning)
    return model


@contextmanager
def _local_checkpoint(source: str | Path, *, only: Sequence[str] | None = None) -> Iterator[Path]:
    """Find the checkpoint that `source` means; one behind a URL is copied here for as long as it is read.

    Of a checkpoint behind a URL, the files named in `only` are copied, or all.
    """
    if "://" in str(source):
        with tempfile.TemporaryDirectory(prefix="cistron-") as folder:
            yield _downloaded(str(source), Path(folder), only)
        return
    path = Path(source).expanduser()
    if path.exists():
        yield path
    elif len(path.parts) != 1 or isinstance(source, Path):
        raise CheckpointNotFoundError(f"no checkpoint at {source}")
    else:
        yield _registered(str(source))


def _registered(name: str) -> Path:
    """Return where the checkpoint of a registry name lies, which has that model's size."""
    _refuse_unpublished(name)
    if name not in ALIASES and name not in _SPECS:
        raise UnknownNameError(
            f"{name!r} is neither a folder here nor a model{nearest(name, _NAMES)} (known: {', '.join(_SPECS)})"
        )
    spec = get_spec(name)
    folder = os.environ.get(MODELS_VARIABLE)
    candidates = () if folder is None else (Path(folder).expanduser() / called for called in (spec.name, name))
    if (found := next(filter(Path.exists, candidates), None)) is not None:
        spec.check_size(read_config(found), source=str(found))
        return found
    where = (
        f"{folder}/{spec.name} does not exist" if folder else f"the environment variable {MODELS_VARIABLE} is not set"
    )
    origin = f"its weights are published at {spec.sources[0]}" if spec.sources else "nobody is known to publish any"
    raise CheckpointNotFoundError(
        f"the weights of {spec.name} are not on this machine: {where}; {origin}. Convert them with `cistron convert` "
        f"into ${MODELS_VARIABLE}/{spec.name}, or give load_model the folder"
    )


def _refuse_unpublished(name: str) -> None:
    if (shape := published.UNPUBLISHED.get(name)) is not None:
        raise UnknownNameError(
            f"no model {name!r} was ever published: neither its weights nor its settings. {shape} is a shape of that "
            "size, for training and for measurements of speed"
        )


def _downloaded(url: str, folder: Path, only: Sequence[str] | None) -> Path:
    """Copy the files of a checkpoint at `url` into `folder`, or those of them named in `only`."""
    if not storage.is_directory(url):
        raise CheckpointNotFoundError(f"no checkpoint at {url}")
    for file in storage.list_files(url):
        if only is not None and storage.name_of(file) not in only:
            continue
        with storage.open_input(file) as source:
            source.download(str(folder / storage.name_of(file)))
    return folder
