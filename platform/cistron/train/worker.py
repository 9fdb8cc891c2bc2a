"""What runs in each Ray Train worker: put the parts together, call the loop, export the result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from cistron.config import resolve
from cistron.data.config import build_plan
from cistron.data.index import read_manifest
from cistron.errors import CheckpointError
from cistron.models.base import Objective, SequenceModel
from cistron.models.families import ModelConfig, build
from cistron.parallel.build import build_strategy
from cistron.parallel.mesh import World
from cistron.parallel.module import recompute_blocks
from cistron.train.callbacks.callback import Callback, Run
from cistron.train.callbacks.checkpointer import Checkpointer
from cistron.train.callbacks.jsonl import JsonlWriter
from cistron.train.callbacks.mirror import METRICS, Mirror
from cistron.train.callbacks.progress import Board, Reporter
from cistron.train.callbacks.ray_metrics import RayMetrics
from cistron.train.callbacks.tensorboard import TensorBoardWriter
from cistron.train.checkpoint import CheckpointStore, Manifest, restore_random_state
from cistron.train.config import PretrainConfig, TrainConfig
from cistron.train.export import export_model, training_form
from cistron.train.loop import evaluate_blocks, forward_flops, train
from cistron.train.metrics import Meter, Metrics, peak_flops
from cistron.train.optim import build_optimizer
from cistron.train.run_folder import RunFolder
from cistron.train.stream import evaluation_blocks, training_steps


class Summary(Callback):
    """Keeps the newest numbers for ``summary.json``, those of earlier attempts included."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self.values: dict[str, float | int | None] = {}

    def on_start(self, run: Run) -> None:
        """Read what earlier attempts recorded: a run that only lacked its export writes no record any more."""
        if run.world.is_main and self._metrics.exists():
            for line in self._metrics.read_text().splitlines():
                self.values |= json.loads(line)
            self.values.pop("time", None)
        self.values["step"] = run.step

    def on_metrics(self, run: Run, metrics: Metrics) -> None:
        """Keep the record."""
        self.values |= metrics.to_json()

    def on_evaluation(self, run: Run, values: Mapping[str, float]) -> None:
        """Keep the held-out losses."""
        self.values |= values


def train_worker(settings: dict[Any, Any]) -> dict[str, float | int | None]:
    """Train on this worker; return the last record.

    Args:
        settings: `config`, a dumped :class:`PretrainConfig`, and `board`, the handle of the progress board or None.
    """
    config = resolve(PretrainConfig, settings["config"])
    assert config.run_dir is not None, "the trainer has chosen a folder"
    folder, world = RunFolder(config.run_dir), World.current()
    shape = training_form(config.model)
    run = begin(config, folder.checkpoints, world, partial(initial_model, shape, config))
    mirror = Mirror(folder.path)
    summary = Summary(mirror.path / METRICS)
    _, corpus = read_manifest(config.data.path)
    train(
        run,
        training_steps(_blocks(run), config.train, world=world, cursor=run.cursor),
        flops=partial(forward_flops, build(shape, device="meta")),
        meter=Meter(world, peak_flops=peak_flops(world.device, config.train.peak_flops)),
        callbacks=[
            *_writers(folder, mirror, settings["board"]),
            summary,
            mirror,  # Before the checkpoint: metrics must never be behind what a restart begins with.
            Checkpointer(folder.checkpoints, publish, corpus=corpus),
        ],
        evaluate=_evaluation(run, shape),
    )
    export_model(run, shape, folder.export)
    return summary.values


def begin(
    config: PretrainConfig, store: CheckpointStore, world: World, build_model: Callable[[torch.device], SequenceModel]
) -> Run:
    """Return the run at its first step, or where its newest checkpoint left it.

    Raises:
        CheckpointError: the checkpoint does not fit the strategy or the number of workers.
    """
    settings = config.train
    strategy = build_strategy(
        settings.strategy, world=world, precision=settings.precision, grad_clip=settings.grad_clip
    )
    strategy.prepare(build_model, partial(build_optimizer, config=settings.optimizer))
    torch.manual_seed(settings.seed + world.rank)
    run = Run(config=config, world=world, strategy=strategy)
    if manifest := store.latest():
        _restore(run, manifest, store.directory(manifest.step))
    return run


def initial_model(shape: ModelConfig, config: PretrainConfig, device: torch.device) -> SequenceModel:
    """Return a model with the run's initial weights, or without any on the meta device."""
    model = build(shape, device=device, dtype=torch.float32).train()
    if device.type != "meta":
        model.init_weights(seed=config.train.seed)
    return recompute_blocks(model) if config.train.recompute else model


def publish(manifest: Manifest, complete: Callable[[], None]) -> None:
    """Report a checkpoint to Ray Train, which commits it once every rank's `complete` has returned."""
    place = ray.train.get_context().get_storage()
    name = CheckpointStore.name(manifest.step)
    checkpoint = ray.train.Checkpoint(place.build_checkpoint_path_from_name(name), filesystem=place.storage_filesystem)

    def wait(saved: ray.train.Checkpoint, _: str) -> ray.train.Checkpoint:
        complete()
        return saved

    ray.train.report(
        {"step": manifest.step, "cursor": manifest.cursor},
        checkpoint=checkpoint,
        checkpoint_dir_name=name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=False,
        checkpoint_upload_fn=wait,
    )


def check_layout(manifest: Manifest, config: TrainConfig) -> None:
    """Check that the strategy and number of workers of `config` can read the checkpoint.

    Raises:
        CheckpointError: they cannot; says what can.
    """
    strategy = config.strategy
    if manifest.folder != strategy.checkpoint_folder:
        raise CheckpointError(f"the checkpoint of step {manifest.step} is a {manifest.folder} one; keep train.strategy")
    if manifest.world_size != config.num_workers and not strategy.reshards:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} was written by {manifest.world_size} workers, and a ZeRO "
            f"checkpoint loads only there: set train.num_workers={manifest.world_size} (fsdp2 resumes on any number)"
        )


def _restore(run: Run, manifest: Manifest, directory: str) -> None:
    run.strategy.load(f"{directory}/{manifest.folder}")
    run.step, run.cursor, run.tokens = manifest.step, manifest.cursor, manifest.tokens
    if run.world.rank < len(manifest.rng):
        restore_random_state(manifest.rng[run.world.rank], run.world.device)


def _blocks(run: Run) -> Any:
    """Return the blocks that Ray Train deals to this worker."""
    shard = ray.train.get_dataset_shard("train")
    return shard.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=run.config.train.blocks_per_worker
    )


def _writers(folder: RunFolder, mirror: Mirror, board: ray.actor.ActorHandle[Board] | None) -> list[Callback]:
    return [
        JsonlWriter(mirror.path / METRICS),
        TensorBoardWriter(mirror.path / "tensorboard"),
        RayMetrics(folder.name),
        *([Reporter(board)] if board is not None else []),
    ]


def _evaluation(run: Run, shape: ModelConfig) -> Callable[[], Mapping[str, float]] | None:
    """Return what scores the held-out samples, or None when nobody asked."""
    if run.config.train.evaluate_every is None:
        return None
    plan = build_plan(run.config.data, split="valid", objective=objective_of(shape))
    blocks = evaluation_blocks(plan, run.config.train, world=run.world)

    def evaluate() -> Mapping[str, float]:
        loss = evaluate_blocks(run.strategy, blocks)
        return {"valid_loss": loss, "valid_perplexity": math.exp(loss)}

    return evaluate


def objective_of(shape: ModelConfig) -> Objective:
    """Return what a model of that shape learns to predict."""
    return "next_token" if shape.model_type == "evo2" else "masked"
