"""What computes parts, in this process or in an actor: a model, loaded once, and the job's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import pyarrow as pa
import torch

from cistron.errors import CapabilityError
from cistron.inference.memory import return_freed_memory
from cistron.models.base import SequenceModel
from cistron.models.layers.linear import reorder_weights
from cistron_jobs.bulk.folder import PartsFolder
from cistron_jobs.model_config import ModelJobConfig, open_model

Compute: TypeAlias = Callable[[SequenceModel, pa.Table], pa.Table]
"""A job's function from the records of a part to the rows of its result."""


@dataclass(frozen=True, slots=True)
class PartReport:
    """What was done for one part.

    Attributes:
        number: of the part.
        records: records in it.
        tokens: tokens that went through the model.
        positions: the same with padding.
        place: the model's precision and device, for people.
    """

    number: int
    records: int
    tokens: int
    positions: int
    place: str


@dataclass(frozen=True, slots=True)
class PartWorker:
    """Computes parts and writes them."""

    config: ModelJobConfig
    device: str
    compute: Compute
    folder: PartsFolder

    def open(self) -> OpenPartWorker:
        """Return the worker that computes; it loads the model with its first part."""
        return OpenPartWorker(self)


class OpenPartWorker:
    """A :class:`PartWorker` in the process where it computes."""

    def __init__(self, worker: PartWorker) -> None:
        self._worker = worker

    def __call__(self, number: int, records: pa.Table) -> PartReport:
        """Compute part `number` and write it.

        Raises:
            CistronError: what the job refuses.
            CapabilityError: the GPU's memory does not suffice.
        """
        model, meter = self._model
        try:
            self._worker.folder.write(number, self._worker.compute(model, records))
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            raise CapabilityError(f"part {number} does not fit into the GPU; lower token_budget ({reason})") from error
        return_freed_memory()
        tokens, positions = meter.take()
        return PartReport(number, records.num_rows, tokens, positions, _place(model))

    @cached_property
    def _model(self) -> tuple[SequenceModel, TokenMeter]:
        # Not in the constructor: Ray keeps the error of a call whole, and of an actor's constructor only the text.
        model = open_model(self._worker.config, device=self._worker.device)
        reorder_weights(model)
        return model, TokenMeter(model)


class TokenMeter:
    """Counts what goes through a model, however its batches are made."""

    def __init__(self, model: SequenceModel) -> None:
        self._positions = 0
        self._tokens: torch.Tensor | int = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def take(self) -> tuple[int, int]:
        """Return the numbers of tokens and of positions, padding included, since the last call."""
        counts = int(self._tokens), self._positions
        self._tokens = self._positions = 0
        return counts

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        ids: torch.Tensor = args[0] if args else kwargs["input_ids"]
        mask: torch.Tensor | None = kwargs.get("attention_mask")
        self._positions += ids.numel()
        # The sum stays on the device: reading it here would make the CPU wait for the GPU at every batch.
        self._tokens = self._tokens + (ids.numel() if mask is None else mask.sum())


def _place(model: SequenceModel) -> str:
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{getattr(model, 'precision_path', weights)} on {model.device.type}"
