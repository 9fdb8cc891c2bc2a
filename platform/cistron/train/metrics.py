"""What a step was worth: loss, speed, and model FLOP/s utilisation (MFU).

MFU = 3 F / (t N P): F, the forward pass's floating-point operations on the tokens of the interval, by the model's own
count (``flops_per_token``, recomputation not included); 3, because a backward pass costs twice a forward pass; t, the
interval's seconds, waiting for data and checkpoints included; N, the number of devices; P, one device's peak FLOP/s.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Final

import torch

from cistron.errors import CistronError
from cistron.parallel.mesh import World

MFU_FORMULA: Final = "mfu = 3 x forward FLOPs / (seconds x devices x peak FLOP/s of one device)"

PEAK_BF16_FLOPS: Final = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}
"""Dense bf16 peaks by what the device's name contains, in vendors' data sheets; the first match counts."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """One record: means over the steps since the last one.

    Attributes:
        step: the last step of the interval, counted from 1.
        loss: weighted mean negative log-likelihood of a target, nats.
        grad_norm: global norm of the last step's gradient before clipping.
        learning_rate: of the last step.
        tokens: trained on since the run began.
        tokens_per_second: over all devices.
        mfu: see the module; None when the peak is not known.
        data_wait: share of the time that this worker waited for data.
        seconds: length of the interval.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    mfu: float | None
    data_wait: float
    seconds: float

    def to_json(self) -> dict[str, float | int | None]:
        """Return the record for ``metrics.jsonl``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step leaves behind; the sums are global except `loss_sum`.

    Attributes:
        loss_sum: this rank's weighted loss, a scalar on its device: reading it would wait for the device.
        weight: of all ranks' targets.
        tokens: of all ranks.
        flops: of all ranks' forward passes.
        grad_norm: a scalar on the device.
        learning_rate: of the step.
        wait_s: seconds for which this rank waited for data.
    """

    loss_sum: torch.Tensor
    weight: float
    tokens: int
    flops: float
    grad_norm: torch.Tensor
    learning_rate: float
    wait_s: float


class Meter:
    """Collects steps and turns them into a record now and then."""

    def __init__(self, world: World, *, peak_flops: float | None) -> None:
        self._world = world
        self._peak = peak_flops
        self._steps: list[StepResult] = []
        self._since = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Take in one step."""
        self._steps.append(result)

    def flush(self, *, step: int, tokens: int) -> Metrics:
        """Return the record of the steps since the last flush; every rank must call it.

        Raises:
            CistronError: the loss or the gradient is no longer a finite number.
        """
        steps, self._steps = self._steps, []
        (loss_sum,) = self._world.all_sum([torch.stack([result.loss_sum for result in steps]).double().sum().item()])
        norm = float(steps[-1].grad_norm)
        loss = loss_sum / sum(result.weight for result in steps)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise CistronError(
                f"training diverged before step {step}: loss {loss}, gradient norm {norm}; resume from the last "
                "checkpoint in a new run_dir with a lower learning rate, a longer warm-up or precision=fp32"
            )
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return Metrics(
            step=step,
            loss=loss,
            grad_norm=norm,
            learning_rate=steps[-1].learning_rate,
            tokens=tokens,
            tokens_per_second=sum(result.tokens for result in steps) / seconds,
            mfu=self._mfu(sum(result.flops for result in steps), seconds),
            data_wait=sum(result.wait_s for result in steps) / seconds,
            seconds=seconds,
        )

    def _mfu(self, forward_flops: float, seconds: float) -> float | None:
        if self._peak is None:
            return None
        return 3 * forward_flops / (seconds * self._world.size * self._peak)


def peak_flops(device: torch.device, configured: float | None) -> float | None:
    """Return the peak FLOP/s of `device`: as configured, else from the table, else None (always so on a CPU)."""
    if configured is not None or device.type != "cuda":
        return configured
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)
