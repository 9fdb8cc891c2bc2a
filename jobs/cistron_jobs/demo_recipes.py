"""What the demo trains, and on what: two recipes in the settings of `prepare_data` and `pretrain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model's way from sequence files to a checkpoint.

    Attributes:
        name: of its folder and, served, of the model.
        title: for people.
        unit: of its loss.
        steps: optimiser steps.
        inputs: packaged sequence files.
        corpus: settings of `prepare_data` beside input and output.
        model: what `pretrain` builds.
        data: settings of the samples.
        train: settings of the run.
        curves: names of the training and the held-out curve.
    """

    name: str
    title: str
    unit: str
    steps: int
    inputs: tuple[str, ...]
    corpus: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    train: Mapping[str, Any]
    curves: tuple[str, str] = ("training", "held out")

    def prepare(self, output: Path) -> dict[str, Any]:
        """Return the settings of `prepare_data`."""
        sample_data = files("cistron_jobs") / "sample_data"
        return {"input": [str(sample_data / name) for name in self.inputs], "output": str(output), **self.corpus}

    def pretrain(self, corpus: Path, run_dir: Path, steps: int) -> dict[str, Any]:
        """Return the settings of `pretrain`, checks and logs spaced to suit the number of steps."""
        spacing = {
            "evaluate_every": max(1, steps // 8),
            "checkpoint_every": max(1, steps // 2),
            "log_every": max(1, steps // 60),
        }
        return {
            "model": dict(self.model),
            "data": {"path": str(corpus), **self.data},
            "train": {"steps": steps, "num_workers": 2, "precision": "fp32", **spacing, **self.train},
            "run_dir": str(run_dir),
        }


RECIPES: Final = (
    Recipe(
        name="evo2-demo",
        title="Evo 2, 4 layers (FSDP2)",
        unit="nats per nucleotide",
        steps=100,
        inputs=("ecoli_k12.fna.gz", "lambda_phage.fna.gz"),
        corpus={"alphabet": "dna", "row_length": 16_384, "validation_fraction": 0.05},
        model={
            "model_type": "evo2",
            "hidden_size": 96,
            "layer_pattern": "SDH*",
            "num_attention_heads": 3,
            "mlp_size": 256,
            "num_filter_groups": 96,
            "parametrization": "training",
            "max_length": 4096,
        },
        data={"max_length": 512},
        train={
            "global_batch_size": 16,
            "samples_per_block": 8,
            "token_budget": 4096,
            "evaluate_samples": 64,
            "strategy": {"kind": "fsdp2"},
            "optimizer": {"learning_rate": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"warmup_steps": 10, "kind": "cosine"},
        },
    ),
    Recipe(
        name="esm2-demo",
        title="ESM-2, 4 layers (ZeRO-2)",
        unit="nats per masked residue",
        steps=150,
        inputs=("uniprot_2k.fasta.gz",),
        corpus={"alphabet": "protein", "validation_fraction": 0.1},
        model={
            "model_type": "esm",
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 384,
        },
        data={"max_length": 254},
        train={
            "global_batch_size": 32,
            "samples_per_block": 16,
            "token_budget": 4096,
            "evaluate_samples": 200,
            "strategy": {"kind": "deepspeed", "zero_stage": 2},
            "optimizer": {"learning_rate": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.01},
            "schedule": {"warmup_steps": 10, "kind": "linear"},
        },
        curves=("training, visible targets too", "held out, behind <mask> only"),
    ),
)
"""The DNA model first, the protein model second."""
