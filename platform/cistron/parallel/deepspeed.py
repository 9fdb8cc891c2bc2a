"""DeepSpeed ZeRO 1, 2 and 3 with torch's own optimisers.

Three habits of DeepSpeed are switched off. It compiles C++ helpers on first use when it finds a compiler; nothing here
needs one. It divides losses by a fixed number of accumulation steps; here the number differs from step to step, so the
boundary is set by hand. And its bf16 mode rounds every weight and buffer; :class:`LossModule` casts what may be cast.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

# Without a GPU DeepSpeed probes for compilers and other vendors' accelerators before it settles for the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import pyarrow.fs
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from cistron.errors import CheckpointError
from cistron.io import storage
from cistron.models.base import SequenceModel
from cistron.parallel.mesh import World
from cistron.parallel.module import Batch, LossModule, ModelFactory, OptimizerFactory, Precision
from cistron.parallel.strategy import DeepSpeedConfig

_TAG: Final = "state"
_NEVER: Final = 10**12


class DeepSpeedStrategy:
    """A DeepSpeed engine around the model and its loss."""

    def __init__(self, config: DeepSpeedConfig, *, world: World, precision: Precision, grad_clip: float | None) -> None:
        self.world = world
        self._precision = precision
        self._settings = _settings(config, grad_clip=grad_clip)
        self._engine: Any
        self._model: SequenceModel

    def prepare(self, build_model: ModelFactory, build_optimizer: OptimizerFactory) -> None:
        """See :meth:`Strategy.prepare`."""
        self._model = build_model(torch.device("cpu"))
        module = LossModule(self._model, self._precision).train()
        _use_no_compiler()
        _hush()
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(self._model), config=self._settings, dist_init_required=False
        )

    def accumulate(self, batch: Batch, *, scale: float, last: bool) -> torch.Tensor:
        """See :meth:`Strategy.accumulate`."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._forward(batch)
        # The engine averages gradients over the ranks; what is wanted is their sum.
        self._engine.backward(loss * (scale * self.world.size), scale_wrt_gas=False)
        if not last:
            self._engine.step()  # Advances the engine's own count of micro-batches; updates nothing.
        return loss.detach()

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """See :meth:`Strategy.evaluate`."""
        self._engine.eval()
        with torch.no_grad():
            loss = self._forward(batch)
        self._engine.train()
        return loss

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """See :meth:`Strategy.full_gradients`."""
        gradients = {
            name: safe_get_full_grad(parameter)
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
        return {name: gradient.float().clone() for name, gradient in gradients.items() if gradient is not None}

    def step(self, learning_rate: float) -> torch.Tensor:
        """See :meth:`Strategy.step`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self.world.device)

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See :meth:`Strategy.full_state`."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name, value in self._model.state_dict().items():
            yield name, (_master(parameters[name]) if name in parameters else value).detach().cpu()

    def save(self, directory: str) -> FinishedSave:
        """See :meth:`Strategy.save`; writes before it returns."""
        filesystem, path = storage.resolve(directory)
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            self._write(path)
        else:
            with tempfile.TemporaryDirectory() as local:
                self._write(local)
                pyarrow.fs.copy_files(local, path, destination_filesystem=filesystem)
        self.world.barrier()
        return FinishedSave()

    def load(self, directory: str) -> None:
        """See :meth:`Strategy.load`."""
        filesystem, path = storage.resolve(directory)
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            self._read(path)
        else:
            with tempfile.TemporaryDirectory() as local:
                pyarrow.fs.copy_files(path, local, source_filesystem=filesystem)
                self._read(local)

    def _forward(self, batch: Batch) -> torch.Tensor:
        return self._engine(batch.input_ids, batch.targets, batch.weights, batch.cu_seqlens)

    def _write(self, directory: str) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(directory, tag=_TAG, save_latest=False)
        for script in Path(directory).glob("*.py"):  # DeepSpeed puts copies of its converters beside the weights.
            script.unlink(missing_ok=True)

    def _read(self, directory: str) -> None:
        loaded, _ = self._engine.load_checkpoint(directory, tag=_TAG)
        if loaded is None:
            raise CheckpointError(f"{directory} holds no DeepSpeed checkpoint")


class FinishedSave:
    """A save that was complete when it was handed out."""

    def wait(self) -> None:
        """See :meth:`PendingSave.wait`."""


def _settings(config: DeepSpeedConfig, *, grad_clip: float | None) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # Not used: batches are packed documents, counted by the caller.
        "gradient_accumulation_steps": 1,  # Not used: the boundary is set by hand.
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": grad_clip or 0.0,
        "steps_per_print": _NEVER,
    }


def _use_no_compiler() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives; gloo does their work."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _hush() -> None:
    """Drop two remarks that say nothing about a run: both are about how DeepSpeed itself was written."""
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # torch 2.13 renamed collectives that DeepSpeed 0.19 calls by their old names.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()


def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the whole fp32 value of a parameter, whatever the stage and whether it is trained."""
    value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if value is not None:
        return value
    with GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
        return parameter.detach().float().clone()
