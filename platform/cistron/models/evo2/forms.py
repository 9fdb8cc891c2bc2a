"""The two forms of Evo 2's filters: what inference evaluates, and the factors of it that training learns.

Training form to inference form is exact. The way back has many answers, as only products are known; the one chosen here
computes the same function: HCM's decay is 1, HCL's p is what a fresh model has. Poles then agree to the rounding of
fp32, about one part in a million. Learning continues well from there, but on another geometry than that of the run that
made the weights: to go on with such a run, convert its own checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch

from cistron.errors import CheckpointError
from cistron.models.evo2.config import HCM, Evo2Config, Parametrization
from cistron.models.evo2.hyena import decayed_taps, factored_log_poles
from cistron.models.evo2.initial import FRESH_P

NamedTensors: TypeAlias = Iterable[tuple[str, torch.Tensor]]
TensorStream: TypeAlias = Iterator[tuple[str, torch.Tensor]]


def to_form(
    config: Evo2Config, tensors: NamedTensors, parametrization: Parametrization
) -> tuple[Evo2Config, TensorStream]:
    """Turn a stream of native tensors into the given form of the same function; see the two functions below."""
    change = to_training_form if parametrization == "training" else to_inference_form
    return change(config, tensors)


def to_inference_form(config: Evo2Config, tensors: NamedTensors) -> tuple[Evo2Config, TensorStream]:
    """Turn a stream of training-form tensors into the inference form of the same function, bit for bit.

    HCL's gamma and p become log poles, and HCM's taps absorb their decay; the rest passes through, as everything does
    when `config` is in inference form already.
    """
    if config.parametrization == "inference":
        return config, iter(tensors)
    return config.model_copy(update={"parametrization": "inference"}), _joined_factors(tensors)


def to_training_form(config: Evo2Config, tensors: NamedTensors) -> tuple[Evo2Config, TensorStream]:
    """Turn a stream of inference-form tensors into a training form of the same function, up to fp32 rounding.

    Factors are fp32. Everything passes through when `config` is in training form already.

    Raises:
        CheckpointError: (from the stream) a filter grows with time, which the training form cannot express.
    """
    if config.parametrization == "training":
        return config, iter(tensors)
    return config.model_copy(update={"parametrization": "training"}), _factored(config, tensors)


def _joined_factors(tensors: NamedTensors) -> TensorStream:
    """Hold back a factor until its partner comes."""
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        waiting[name] = tensor
        if {f"{module}.gamma", f"{module}.p"} <= waiting.keys():
            gamma, p = waiting.pop(f"{module}.gamma"), waiting.pop(f"{module}.p")
            yield f"{module}.log_poles", factored_log_poles(gamma, p)
        elif {f"{module}.taps", f"{module}.decay"} <= waiting.keys():
            yield f"{module}.taps", decayed_taps(waiting.pop(f"{module}.taps"), waiting.pop(f"{module}.decay"))
        elif leaf not in {"gamma", "p", "taps", "decay"}:
            yield name, waiting.pop(name)
    yield from waiting.items()  # HCS taps have no decay


def _factored(config: Evo2Config, tensors: NamedTensors) -> TensorStream:
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "log_poles":
            p = torch.full(tensor.shape, FRESH_P, dtype=torch.float32, device=tensor.device)
            yield f"{module}.gamma", _gamma(name, tensor)
            yield f"{module}.p", p
        elif leaf == "taps" and config.layer_pattern[int(name.split(".")[1])] == HCM:
            yield name, tensor.float()
            yield f"{module}.decay", torch.ones_like(tensor, dtype=torch.float32)
        else:
            yield name, tensor


def _gamma(name: str, log_poles: torch.Tensor) -> torch.Tensor:
    """Return log(-log_poles) - p, computed in double precision so that only the result is rounded."""
    if not bool((log_poles < 0).all()):
        raise CheckpointError(f"{name}: the training form needs decaying filters, and a log pole is not below 0")
    return (log_poles.double().neg().log() - FRESH_P).float()
