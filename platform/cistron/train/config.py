"""Every setting of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator

from cistron.config import Config, merge
from cistron.data.config import DataConfig
from cistron.models.published import ALIASES
from cistron.parallel.module import Precision
from cistron.parallel.strategy import Fsdp2Config, StrategyConfig

ESM2_DECAY_SHARE: Final = 0.9
"""Share of the run over which a schedule of kind `esm2` decays, warm-up included."""


ESM2_RECIPE: Final[Mapping[str, Any]] = {
    "optimizer": {"learning_rate": 4e-4, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01},
    "schedule": {"kind": "esm2", "warmup_steps": 2000, "min_ratio": 0.1},
}
"""How ESM-2 was trained (Lin et al. 2023, supplementary materials)."""

ESM2_15B_RECIPE: Final[Mapping[str, Any]] = {"optimizer": {"learning_rate": 1.6e-4, "weight_decay": 0.1}}
"""Where the largest one differs."""


class OptimizerConfig(Config):
    """How gradients become updates."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay; norms, biases and filter parameters are exempt."""


class ScheduleConfig(Config):
    """The learning rate over the run."""

    kind: Literal["cosine", "linear", "esm2", "constant"] = "cosine"
    """Form of the decay; esm2 is linear over nine tenths of the run, then constant, as ESM-2 was trained."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to the peak."""
    decay_steps: int | None = Field(default=None, gt=0)
    """Step at which the decay ends and the rate stays; the run's last step if not given."""
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    """Rate at the end of the decay, as a share of the peak."""

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        if self.kind == "esm2" and self.decay_steps is not None:
            raise ValueError("decay_steps: a schedule of kind esm2 ends its decay at nine tenths of the run")
        return self


class TrainConfig(Config):
    """How to train."""

    steps: int = Field(gt=0)
    """Optimiser steps of the whole run."""
    num_workers: int = Field(default=1, gt=0)
    """Data-parallel workers, one process each."""
    use_gpu: bool = False
    """One GPU for each worker; otherwise gloo on CPUs."""
    cpus_per_worker: int = Field(default=1, gt=0)
    """Logical CPUs that Ray sets aside for each worker."""
    reader_cpus: int = Field(default=1, gt=0)
    """Logical CPUs that must stay free for reading data; without any, Ray Data waits for ever."""
    preflight: bool = True
    """Refuse to start when too few CPUs or GPUs are free; switch off where nodes are added on demand."""
    global_batch_size: int = Field(gt=0)
    """Samples of one optimiser step, over all workers and micro-batches."""
    samples_per_block: int = Field(default=1, gt=0)
    """Samples that are read and packed together on one worker."""
    token_budget: int = Field(gt=0)
    """Most tokens in one packed micro-batch."""
    precision: Precision = "bf16"
    """Of matrix products; weights, gradients and optimiser states are fp32."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest global norm of the gradients; null leaves them alone."""
    strategy: StrategyConfig = Fsdp2Config()
    recompute: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between checkpoints; there is one at the end in any case."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints to keep."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Steps between losses on held-out samples; null for none."""
    evaluate_samples: int = Field(default=256, gt=0)
    """Held-out samples of each evaluation, always the same ones."""
    log_every: int = Field(default=10, gt=0)
    """Steps over which a record of metrics is averaged; one ends at each checkpoint, too."""
    max_failures: int = Field(default=2, ge=-1)
    """Restarts after a worker failed; -1 for any number. Preempted nodes do not count."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Peak FLOP/s of one device, the denominator of MFU; known GPUs are looked up if not given."""

    @property
    def blocks_per_worker(self) -> int:
        """Blocks that one worker consumes in one step."""
        return self.global_batch_size // (self.samples_per_block * self.num_workers)

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        unit = self.samples_per_block * self.num_workers
        if self.global_batch_size % unit:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of samples_per_block x num_workers "
                f"= {self.samples_per_block} x {self.num_workers} = {unit}"
            )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        """Refuse the published warm-up, which an ESM-2 run has without a word, in a run too short for it."""
        warmup, end = self.schedule.warmup_steps, ESM2_DECAY_SHARE * self.steps
        if self.schedule.kind == "esm2" and warmup > end:
            raise ValueError(
                f"schedule.warmup_steps={warmup} is more than nine tenths of steps={self.steps}: the learning rate "
                "would never reach its peak; set schedule.warmup_steps, or another schedule.kind"
            )
        return self


class PretrainConfig(Config):
    """A whole run.

    What an ESM-2 run does not say of its optimiser and schedule is as published (:data:`ESM2_RECIPE`), not the default
    of the field.
    """

    model: str | dict[str, Any]
    """Registry name such as `evo2_7b` or `esm2_t33_650M_UR50D`, or a mapping with `model_type` and its settings."""
    data: DataConfig
    """What to train on."""
    train: TrainConfig
    """How to train."""
    run_dir: str | None = None
    """Folder or URL of the run; the same command with the same folder resumes. runs/<id> if not given."""

    @model_validator(mode="before")
    @classmethod
    def _fill_recipe(cls, settings: Any) -> Any:
        """Lay what is given over the published recipe of an ESM-2; faults are left to the fields."""
        if not isinstance(settings, dict) or not isinstance(settings.get("train"), dict):
            return settings
        return {**settings, "train": merge(_recipe(settings.get("model")), settings["train"])}


def _recipe(model: Any) -> dict[str, Any]:
    """Return what is published of the training of `model`, as far as it differs from the fields' defaults."""
    if isinstance(model, dict):
        return dict(ESM2_RECIPE) if model.get("model_type") == "esm" else {}
    name = ALIASES.get(str(model), str(model))
    if not name.startswith("esm2"):
        return {}
    return merge(ESM2_RECIPE, ESM2_15B_RECIPE if name == ALIASES["esm2_15b"] else {})
