"""Which arithmetic a model runs in, and why.

Released Evo 2 weights were trained with FP8 input projections, and some sizes lose their quality without them. What is
known comes from two publications: the support matrix and evaluation losses in the README of NVIDIA's BioNeMo recipe for
Evo 2 (:data:`EVIDENCE`), and Arc Institute's README, which asks for FP8 on Hopper for 1B, 20B and 40B. ``auto`` takes a
path only if that evidence says it is good; every other path runs when it is named, with a warning.

ESM-2 has one path of its own, which only runs when it is named: ``int8``, its linear layers in int8 on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch

from cistron.errors import CapabilityError, ConfigError
from cistron.models import published
from cistron.models.esm2.config import Esm2Config
from cistron.models.evo2.config import Evo2Config
from cistron.models.families import ModelConfig
from cistron.models.layers.fp8 import Fp8Path
from cistron.models.layers.fp8_hardware import Generation, Hardware, fp8_hardware

Precision = Literal["auto", "fp8", "fp8_emulated", "fp8_hopper_emulated", "bf16", "fp32", "int8"]

Verdict = Literal["good", "bad", "untested"]

DTYPES: Final[Mapping[str, torch.dtype]] = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.float32}
"""Of the weights as they are loaded; int8 is made from fp32."""
_EMULATIONS: Final[Mapping[str, Fp8Path]] = {"fp8_emulated": "emulated", "fp8_hopper_emulated": "hopper_emulated"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is published about a checkpoint that was trained with FP8.

    Attributes:
        fp8: by GPU generation; emulation with sums in fp32 counts as Blackwell, whose sums are not reduced either.
        losses: evaluation losses at 8,192 nt behind it, or nothing.
    """

    fp8: Mapping[Generation, Verdict]
    losses: str = ""


EVIDENCE: Final[Mapping[str, Evidence]] = {
    "evo2_1b_base": Evidence(
        {"hopper": "good", "blackwell": "good"}, "evaluation loss 1.08 in FP8 (Hopper and Blackwell), 1.24 in bf16"
    ),
    "evo2_20b": Evidence({"hopper": "good"}),
    "evo2_40b_base": Evidence({"hopper": "good"}),
    "evo2_40b": Evidence(
        {"hopper": "good", "blackwell": "bad"},
        "evaluation loss 0.92 in FP8 on Hopper, 1.79 in FP8 with sums in full precision, 1.70 in bf16",
    ),
}
"""By registry name. The 7B family is missing on purpose: it runs equally well in bf16 and in FP8."""

_UNKNOWN: Final = Evidence({"hopper": "good"})
"""A checkpoint of another shape that says it needs FP8: all that were published were trained on Hopper."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model will run.

    Attributes:
        path: its name, as in ``Precision``; None for the dtype of the stored weights.
        dtype: of the weights; None as stored.
        fp8: how the input projections multiply; None in the dtype of the weights.
        reason: one clause.
        warning: what is known against it, or nothing.
    """

    path: str | None
    dtype: torch.dtype | None
    fp8: Fp8Path | None
    reason: str
    warning: str = ""


def plan_precision(
    config: ModelConfig, precision: Precision, *, dtype: torch.dtype | None, device: torch.device, source: str
) -> Plan:
    """Choose the path of a model.

    Args:
        config: the model's.
        precision: a path, or ``auto``.
        dtype: of the weights, where the caller wants one; ``bf16`` and ``fp32`` are one themselves.
        device: where it will run.
        source: names the model in messages.

    Raises:
        CapabilityError: ``fp8`` without such hardware, ``int8`` elsewhere than on a CPU; ``auto`` where no path here is
            known to be good.
        ConfigError: an FP8 path for a model that has no such projections, or int8 for one that is not ESM-2.
    """
    if precision == "int8":
        return _in_int8(config, device, source)
    evidence = _evidence(config)
    if precision in DTYPES:
        return Plan(precision, DTYPES[precision], None, "as asked", _warning(evidence, "bad"))
    if precision == "auto" and evidence is None:
        return Plan(None, dtype, None, "as asked" if dtype else "as stored")
    if not isinstance(config, Evo2Config):
        raise ConfigError(f"precision={precision} is for the input projections of Evo 2, and {source} has none")
    if precision in _EMULATIONS:
        return _emulated(precision, dtype, evidence, config)
    hardware = fp8_hardware(device)
    verdict = _verdict(evidence, hardware.generation)
    if precision == "auto" and (hardware.path is None or verdict != "good"):
        raise CapabilityError(_refusal(source, hardware, evidence))
    if hardware.path is None:
        raise CapabilityError(
            f"precision=fp8 is not possible here: {hardware.reason}; fp8_emulated and fp8_hopper_emulated run anywhere"
        )
    return Plan("fp8", dtype, hardware.path, f"on {hardware.reason}{_scales(config)}", _warning(evidence, verdict))


def _in_int8(config: ModelConfig, device: torch.device, source: str) -> Plan:
    if not isinstance(config, Esm2Config):
        raise ConfigError(f"precision=int8 is for the linear layers of ESM-2, and {source} has none that it applies to")
    if device.type != "cpu":
        raise CapabilityError(f"precision=int8 runs on the CPU, and {source} is to run on {device}: use bf16 there")
    return Plan("int8", DTYPES["int8"], None, "as asked")


def _evidence(config: ModelConfig) -> Evidence | None:
    """Return what is known about a model that needs FP8, found by its shape; None if it needs none."""
    if not isinstance(config, Evo2Config) or not config.requires_fp8:
        return None
    for spec in published.all_specs():
        if spec.name in EVIDENCE and _shape(spec.config) == _shape(config):
            return EVIDENCE[spec.name]
    return _UNKNOWN


def _shape(config: ModelConfig) -> tuple[object, ...]:
    assert isinstance(config, Evo2Config)
    return config.hidden_size, config.layer_pattern, config.mlp_size


def _verdict(evidence: Evidence | None, generation: Generation | None) -> Verdict:
    """Return what is known of FP8 on a GPU generation; a model that does not need FP8 does well with it anyway."""
    if evidence is None:
        return "good"
    return "untested" if generation is None else evidence.fp8.get(generation, "untested")


def _emulated(precision: str, dtype: torch.dtype | None, evidence: Evidence | None, config: Evo2Config) -> Plan:
    """Plan an emulation; the reason says what it was never compared with."""
    hopper = precision == "fp8_hopper_emulated"
    sums = "summed as published models of Hopper do" if hopper else "summed in fp32"
    reason = f"FP8 emulated, {sums}, not compared with hardware{_scales(config)}"
    verdict = "good" if hopper else _verdict(evidence, "blackwell")
    return Plan(precision, dtype, _EMULATIONS[precision], reason, _warning(evidence, verdict))


def _scales(config: Evo2Config) -> str:
    return ", stored scales" if config.fp8_scales else ", scales 1 because the checkpoint stores none"


def _warning(evidence: Evidence | None, verdict: Verdict) -> str:
    """Say what is known against a path, for a model that needs FP8."""
    if evidence is None or verdict == "good":
        return ""
    losses = f" ({evidence.losses})" if evidence.losses else ""
    if verdict == "bad":
        return f"these weights are known to degrade on this path{losses}"
    return f"nobody has published how these weights do on this path{losses}"


def _refusal(source: str, hardware: Hardware, evidence: Evidence | None) -> str:
    """Say why ``auto`` found nothing, and what may be asked for instead."""
    losses = f" ({evidence.losses})" if evidence is not None and evidence.losses else ""
    here = "FP8 here is not known to be good enough" if hardware.path else "there is no FP8 here"
    return (
        f"{source} was trained with FP8 input projections and is known to degrade without them{losses}, and {here}: "
        f"{hardware.reason}. Name a path to run it anyway: precision='fp8_hopper_emulated' (slow, closest to what the "
        "weights expect), 'fp8_emulated', 'bf16' or 'fp32'" + (", or 'fp8'" if hardware.path else "")
    )
