"""Which model a job runs, where and how; how to open it, and what can be known of it before."""

from __future__ import annotations

import torch

from cistron.config import Config
from cistron.errors import ConfigError
from cistron.models.base import SequenceModel
from cistron.models.families import build
from cistron.models.registry import Precision, describe_checkpoint, load_model


class ModelJobConfig(Config):
    """Which model runs, where and how."""

    model: str
    """Native checkpoint (folder or URL), or a registry name whose weights are on disk."""
    device: str = "auto"
    """Where the model runs: auto (a GPU when there is one), cpu, cuda or cuda:1."""
    precision: Precision = "auto"
    """auto takes the path that is known to be good for the model on this device, or refuses; others run as named. int8:
    the linear layers of ESM-2 on a CPU, 1.4 to 1.9 times as fast; the log says how far its logits are from fp32. In
    fp32 on a CPU workers hold linear layers of up to 1 GiB twice, once in the order in which they are multiplied."""


def checked_device(device: str) -> str:
    """Return the device that a setting means on this machine.

    Raises:
        ConfigError: a device that does not exist.
    """
    chosen = device
    if device == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: {device!r} is not a device of this machine ({reason})") from error
    return chosen


def open_model(config: ModelJobConfig, *, device: str | None = None) -> SequenceModel:
    """Load the model of a job, on `device` if that is given.

    Raises:
        ConfigError: a device that does not exist.
    """
    return load_model(config.model, device=checked_device(device or config.device), precision=config.precision)


def model_shell(config: ModelJobConfig) -> SequenceModel:
    """Return the job's model without its weights: what can be checked before they are loaded, which takes long."""
    return build(describe_checkpoint(config.model)[0], device="meta").eval()
