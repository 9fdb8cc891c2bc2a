"""All sizes and times of a run, and those of a rehearsal.

Ops are asked for at the widths 1,920 and 4,096, which are those of Evo 2 1B and 7B. The ops of ESM-2 are timed at the
same widths, as an ESM-2 of them would be: heads of 64, and four times the width inside. No whole-model figure depends
on this, because training takes its sizes from the registry. ESM-2's own widths follow at the end of the section, at one
number of tokens, as far as its share of the time goes: so the whole run gets no longer, and what is asked for comes
first. They also make the processes that check compile what training will run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.gpu.cases.case import Family, Model

EVO2_1B: Final = Model("Evo 2 1B", width=1920, heads=15, inner=5120, groups=128, vocabulary=512)
EVO2_7B: Final = Model("Evo 2 7B", width=4096, heads=32, inner=11_264, groups=256, vocabulary=512)
ESM2_AT_1920: Final = Model("ESM-2 at 1,920", width=1920, heads=30, inner=7680, groups=1, vocabulary=33)
ESM2_AT_4096: Final = Model("ESM-2 at 4,096", width=4096, heads=64, inner=16_384, groups=1, vocabulary=33)
ESM2_650M: Final = Model("ESM-2 650M", width=1280, heads=20, inner=5120, groups=1, vocabulary=33)
ESM2_3B: Final = Model("ESM-2 3B", width=2560, heads=40, inner=10_240, groups=1, vocabulary=33)
_TOY_EVO2: Final = Model("toy", width=2, heads=1, inner=5, groups=1, vocabulary=33)
"""Triton's interpreter runs the programs of a grid one by one, and the scan has one for each channel."""
_TOY_ESM2: Final = Model("toy", width=32, heads=2, inner=48, groups=1, vocabulary=33)
_SMALLER_TOY_ESM2: Final = Model("smaller toy", width=16, heads=1, inner=24, groups=1, vocabulary=33)


@dataclass(frozen=True, slots=True)
class Training:
    """A whole-model training step.

    Attributes:
        name: how the table calls it.
        model: name in the registry.
        attempts: micro-batches in tokens, and whether blocks are recomputed; the first that fits into memory counts.
        step_tokens: tokens of an optimiser step.
        asked: tokens/s, or None.
        published: what others report.
    """

    name: str
    model: str
    attempts: tuple[tuple[int, bool], ...]
    step_tokens: int
    asked: float | None
    published: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does.

    Attributes:
        rehearsal: nothing is measured.
        device: where it runs.
        copy_elements: of the copy that gives the bandwidth.
        gemm_size: rows and columns of the product that gives the arithmetic.
        check: rows and their tokens in the checks, which no kernel's tile divides.
        models: at whose sizes ops are checked (the first) and timed.
        further: at whose sizes ops are timed after all others, at the first number of tokens.
        tokens: at which ops are timed.
        rows: of one token each, at which ops of single tokens are timed.
        compiled_tokens: at which torch.compile is beside them.
        lengths: of the Hyena stack, increasing.
        trainings: whole models.
        document: tokens of a training context of Evo 2.
        training_steps: that are timed, after one that is not.
        changes: settings of whole models, by name, that differ from the registry's.
        decode_model: the registry's name of the model that decodes.
        prompts: lengths of the batches of prompts that it continues.
        steps: tokens per continuation.
        shares: most seconds of each section.
        workers: processes that check; 0 checks in this one.
        compiler: backend of torch.compile.
        compiling_seconds: after which no more references are compiled.
    """

    rehearsal: bool
    device: torch.device
    copy_elements: int
    gemm_size: int
    check: tuple[int, int]
    models: Mapping[Family, tuple[Model, ...]]
    further: Mapping[Family, tuple[Model, ...]]
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    compiled_tokens: int
    lengths: tuple[int, ...]
    trainings: tuple[Training, ...]
    document: int
    training_steps: int
    changes: Mapping[str, Mapping[str, Any]]
    decode_model: str
    prompts: Mapping[str, tuple[int, ...]]
    steps: int
    shares: Mapping[str, float]
    workers: int
    compiler: str
    compiling_seconds: float


def measurement(device: torch.device) -> Plan:
    """Return the plan of a run on a GPU: under 8 minutes."""
    return Plan(
        rehearsal=False,
        device=device,
        copy_elements=1 << 31,
        gemm_size=8_192,
        check=(2, 1_001),
        models={"evo2": (EVO2_1B, EVO2_7B), "esm2": (ESM2_AT_1920, ESM2_AT_4096)},
        further={"evo2": (), "esm2": (ESM2_650M, ESM2_3B)},
        tokens=(65_536, 131_072, 8_192),
        rows=(64, 1),
        compiled_tokens=65_536,
        lengths=(8_192, 32_768, 131_072, 524_288, 1_048_576),
        trainings=_TRAININGS,
        document=8_192,
        training_steps=3,
        changes={},
        decode_model="evo2_1b_base",
        prompts={"1 prompt": (1_024,), "64 prompts of 128 to 1,920": tuple(128 + 1_792 * i // 63 for i in range(64))},
        steps=64,
        shares={"ceilings": 10, "checks": 130, "kernels": 110, "length": 30, "training": 105, "decode": 45},
        workers=12,
        compiler="inductor",
        compiling_seconds=50,
    )


def rehearsal() -> Plan:
    """Return the plan of a rehearsal on the CPU, in Triton's interpreter: seconds."""
    return Plan(
        rehearsal=True,
        device=torch.device("cpu"),
        copy_elements=1 << 10,
        gemm_size=16,
        check=(1, 13),
        models={"evo2": (_TOY_EVO2,), "esm2": (_TOY_ESM2,)},
        further={"evo2": (), "esm2": (_SMALLER_TOY_ESM2,)},
        tokens=(12,),
        rows=(3,),
        compiled_tokens=12,
        lengths=(8, 16),
        trainings=(
            Training("Evo 2 tiny", "evo2_tiny", ((16, False),), 16, None, ""),
            Training("ESM-2 tiny", "esm2_tiny", ((32, True),), 64, None, ""),
        ),
        document=16,
        training_steps=1,
        changes={
            "evo2_tiny": {
                "layer_pattern": "SDH*",
                "hidden_size": 2,
                "mlp_size": 6,
                "num_attention_heads": 1,
                "num_filter_groups": 1,
            },
            "esm2_tiny": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 32},
        },
        decode_model="evo2_tiny",
        prompts={"2 prompts of 2 and 9": (2, 9)},
        steps=1,
        shares={"ceilings": 5, "checks": 30, "kernels": 30, "length": 20, "training": 30, "decode": 20},
        workers=0,
        compiler="eager",
        compiling_seconds=30,
    )


_TRAININGS: Final = (
    Training(
        "Evo 2 1B, contexts of 8,192",
        "evo2_1b_base",
        ((32_768, False), (16_384, False), (8_192, False), (16_384, True)),
        step_tokens=65_536,
        asked=70_000,
        published="26,859 bf16 (48 GPUs)",
    ),
    Training(
        "ESM-2 650M, packed proteins",
        "esm2_t33_650M_UR50D",
        ((65_536, False), (32_768, False), (16_384, False), (32_768, True)),
        step_tokens=131_072,
        asked=125_000,
        published="about 96,000, padding counted",
    ),
    Training(
        "ESM-2 3B, packed proteins",
        "esm2_t36_3B_UR50D",
        ((16_384, False), (8_192, False), (16_384, True)),
        step_tokens=65_536,
        asked=33_000,
        published="about 27,000, padding counted",
    ),
)
