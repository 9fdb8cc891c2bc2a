"""From the sharded weights of a run to a native checkpoint that everything else reads."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs

from cistron import __version__
from cistron.io import storage
from cistron.models.checkpoint import write_checkpoint
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.forms import to_inference_form
from cistron.models.families import ModelConfig
from cistron.models.registry import config_from
from cistron.train.callbacks.callback import Run


def training_form(model: str | Mapping[str, Any]) -> ModelConfig:
    """Return the configuration under which `model` is trained from fresh weights.

    Evo 2 learns the factors of its filters instead of the filters, unless a mapping says otherwise. What is trained
    here does without FP8, whatever the published weights of that shape need.
    """
    shape = config_from(model)
    if not isinstance(shape, Evo2Config):
        return shape
    chosen = isinstance(model, Mapping) and "parametrization" in model
    form = shape.parametrization if chosen else "training"
    return shape.model_copy(update={"parametrization": form, "requires_fp8": False, "fp8_scales": False})


def export_model(run: Run, shape: ModelConfig, destination: str) -> None:
    """Write the run's weights to `destination`, in the form that inference reads; an earlier export is replaced.

    Every rank must call it: the weights come together tensor by tensor on rank 0, which writes them.
    """
    tensors = run.strategy.full_state()
    if not run.world.is_main:
        deque(tensors, maxlen=0)
    else:
        if isinstance(shape, Evo2Config):
            shape, tensors = to_inference_form(shape, tensors)
        provenance = {"cistron": __version__, "step": run.step, "tokens": run.tokens, "model": run.config.model}
        with tempfile.TemporaryDirectory() as folder:
            local = Path(storage.resolve(destination)[1]) if storage.is_local(destination) else Path(folder) / "export"
            storage.remove_tree(destination)
            write_checkpoint(shape, tensors, local, provenance=provenance)
            if not storage.is_local(destination):
                filesystem, path = storage.resolve(destination)
                pyarrow.fs.copy_files(str(local), path, destination_filesystem=filesystem)
    run.world.barrier()
