"""A run as its driver sees it: check everything that can be checked, hand over to Ray Train, sum up."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cistron.config import resolve
from cistron.data.config import build_plan
from cistron.data.index import read_manifest
from cistron.data.plan import SamplePlan
from cistron.data.source import ordered_ingest, training_dataset
from cistron.errors import CheckpointError, CistronError, ConfigError, own_error
from cistron.io import storage
from cistron.models.families import ModelConfig
from cistron.train.callbacks.progress import terminal_progress
from cistron.train.config import PretrainConfig, TrainConfig
from cistron.train.export import training_form
from cistron.train.metrics import MFU_FORMULA
from cistron.train.run_folder import RunFolder
from cistron.train.worker import check_layout, objective_of, train_worker

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> str:
    """Train, or go on training, and return the run folder.

    Ray must be initialised. The same configuration in the same `run_dir` resumes from the newest checkpoint; a run that
    has already ended is left as it is.

    Raises:
        ConfigError: too few CPUs or GPUs are free, or as :func:`check`, whose other errors it raises, too.
        CistronError: training failed on a worker.
    """
    config = locate(config)
    folder = check(config)
    done = folder.read_summary()
    if done is not None and done["step"] >= config.train.steps:
        logger.info("%s has already ended at step %d", folder.path, done["step"])
        return folder.path
    check_cluster(config.train)
    folder.claim(config)
    logger.info("%s; %s", folder.path, MFU_FORMULA)
    record = _fit(config, folder)
    folder.write_summary({"model": config.model, "run_dir": folder.path, "export": folder.export, **record})
    return folder.path


def locate(config: PretrainConfig) -> PretrainConfig:
    """Return `config` with a run folder and absolute paths: workers have working directories of their own."""
    run_dir = config.run_dir or f"runs/{_run_id(config)}"
    data = config.data.model_copy(update={"path": _absolute(config.data.path)})
    return config.model_copy(update={"run_dir": _absolute(run_dir), "data": data})


def check(config: PretrainConfig) -> RunFolder:
    """Check everything that can be checked without a cluster, writing nothing; return the folder of the located run.

    Raises:
        ConfigError: the settings contradict each other, the data or the run that is in `run_dir`.
        UnknownNameError: no such model.
        InputError: the corpus cannot be read.
        CheckpointError: the newest checkpoint of the run cannot be resumed from.
    """
    assert config.run_dir is not None, "located"
    folder = RunFolder(config.run_dir)
    check_data(config, _shape(config))
    folder.check(config)
    check_checkpoint(config, folder)
    return folder


def check_data(config: PretrainConfig, shape: ModelConfig) -> None:
    """Check that the corpus exists and fits the model and the sizes.

    Raises:
        ConfigError: a document may be longer than a micro-batch, or than the model's context.
    """
    plan = _plan(config, shape, "train")
    if config.train.evaluate_every is not None:
        _plan(config, shape, "valid")
    if plan.max_tokens > config.train.token_budget:
        raise ConfigError(
            f"train.token_budget={config.train.token_budget} is less than the longest sample has tokens "
            f"({plan.max_tokens}): raise it, or lower data.max_length"
        )
    if shape.model_type == "evo2" and config.data.max_length > shape.max_length:
        raise ConfigError(
            f"data.max_length={config.data.max_length} is longer than the model's context of {shape.max_length} nt"
        )


def check_checkpoint(config: PretrainConfig, folder: RunFolder) -> None:
    """Check that the newest checkpoint, if there is one, is whole and fits the corpus and the workers.

    Raises:
        CheckpointError: it does not.
    """
    manifest = folder.checkpoints.latest()
    if manifest is None:
        return
    check_layout(manifest, config.train)
    folder.checkpoints.verify(manifest)
    _, corpus = read_manifest(config.data.path)
    if corpus != manifest.corpus:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} was trained on another corpus than the one at {config.data.path}: "
            "data.path may name another place, but what is there must be the same"
        )


def check_cluster(config: TrainConfig) -> None:
    """Check that workers and readers find their CPUs and GPUs.

    Raises:
        ConfigError: too few are free; without the check the run would wait for ever.
    """
    if not config.preflight:
        return
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    workers = config.num_workers * config.cpus_per_worker
    needed = workers + config.reader_cpus
    if free.get("CPU", 0) < needed:
        raise ConfigError(
            f"{config.num_workers} workers with {config.cpus_per_worker} CPUs each and {config.reader_cpus} for "
            f"reading need {needed} free logical CPUs, and the Ray cluster has {free.get('CPU', 0):g}: lower "
            "train.num_workers, add nodes, or set train.preflight=false where nodes are added on demand"
        )
    if config.use_gpu and free.get("GPU", 0) < config.num_workers:
        raise ConfigError(
            f"train.use_gpu=true needs {config.num_workers} free GPUs, and the Ray cluster has {free.get('GPU', 0):g}"
        )


def _fit(config: PretrainConfig, folder: RunFolder) -> dict[str, Any]:
    settings = config.train
    folder.forget_ray()
    with ExitStack() as stack:
        stack.enter_context(_interruptible())
        board = stack.enter_context(terminal_progress(folder.name, total=settings.steps))
        trainer = TorchTrainer(
            train_worker,  # type: ignore[arg-type]  # it may return a value: `return_value` of the result
            train_loop_config={"config": config.model_dump(mode="json"), "board": board},
            torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.num_workers,
                use_gpu=settings.use_gpu,
                resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})},
            ),
            run_config=ray.train.RunConfig(
                name=folder.name,
                storage_path=folder.path.removesuffix(folder.name).rstrip("/") or "/",
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            ),
            datasets={"train": partial(dataset, config.model_dump(mode="json"))},
            dataset_config=ordered_ingest(),
        )
        return _result(trainer)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Ray Train's own handler ends the process with status 0, and stays for ever."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _result(trainer: TorchTrainer) -> dict[str, Any]:
    """Run the trainer; an error that Cistron raised on a worker comes out as itself."""
    try:
        return dict(getattr(trainer.fit(), "return_value", None) or {})
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        causes = (own_error(getattr(failure, "_base_exc", failure)) for failure in failures.values())
        cause = next((cause for cause in causes if isinstance(cause, CistronError)), None)
        raise (cause or CistronError(f"training failed: {error}")) from error


def dataset(settings: dict[str, Any]) -> ray.data.Dataset:
    """Return the samples from the newest checkpoint's cursor on; Ray Train asks at every (re)start of its workers."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = resolve(PretrainConfig, settings)
    assert config.run_dir is not None, "located"
    manifest = RunFolder(config.run_dir).checkpoints.latest()
    stop = config.train.steps * config.train.global_batch_size
    # A run that stopped between its last step and its export reads nothing more, but a dataset has to have a block.
    start = min(manifest.cursor if manifest else 0, stop - config.train.global_batch_size)
    plan = _plan(config, training_form(config.model), "train")
    return training_dataset(plan, start=start, stop=stop, samples_per_block=config.train.samples_per_block)


def _shape(config: PretrainConfig) -> ModelConfig:
    """Return what is trained; a fault in a `model` mapping is named by its dotted path."""
    try:
        return training_form(config.model)
    except ConfigError as error:
        faults = [f"model.{fault}".replace("model.configuration: ", "model: ") for fault in str(error).splitlines()]
        raise ConfigError("\n".join(faults)) from error


def _plan(config: PretrainConfig, shape: ModelConfig, split: str) -> SamplePlan:
    return build_plan(config.data, split=split, objective=objective_of(shape))


def _absolute(path: str) -> str:
    return storage.resolve(path)[1] if storage.is_local(path) else path.rstrip("/")


def _run_id(config: PretrainConfig) -> str:
    model = config.model if isinstance(config.model, str) else config.model.get("model_type", "model")
    return f"pretrain-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
