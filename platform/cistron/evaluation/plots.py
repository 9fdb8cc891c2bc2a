"""Pictures of a run: static files that need no notebook, each with its numbers beside it as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]
"""Points (step, loss)."""

_TRAIN_COLOUR: Final = "#4c78a8"
_VALID_COLOUR: Final = "#e45756"
_BASELINE_STYLES: Final = (":", "--", "-.")


@dataclass(frozen=True, slots=True)
class LossPanel:
    """One model's learning beside what simple models reach.

    Attributes:
        title: what was trained.
        unit: of the loss, such as ``nats per nucleotide``.
        train: the loss of each logged step.
        valid: the loss on held-out sequence.
        baselines: held-out losses of simpler models, by name; drawn as horizontal lines.
        train_name: of the training curve, where it counts other positions than the held-out one.
        valid_name: of the held-out curve.
    """

    title: str
    unit: str
    train: Curve
    valid: Curve
    baselines: Mapping[str, float] = field(default_factory=dict)
    train_name: str = "training"
    valid_name: str = "held out"


def plot_losses(panels: Sequence[LossPanel], destination: Path) -> Path:
    """Draw the panels side by side as a PNG at `destination`, and write their points to a CSV beside it."""
    figure = Figure(figsize=(5.6 * len(panels), 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel)
    destination.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(destination, dpi=150)
    _write_csv(panels, destination.with_suffix(".csv"))
    return destination


def _draw(axes: Any, panel: LossPanel) -> None:
    axes.plot(*_columns(panel.train), color=_TRAIN_COLOUR, linewidth=1, alpha=0.8, label=panel.train_name)
    axes.plot(
        *_columns(panel.valid), color=_VALID_COLOUR, linewidth=1.8, marker="o", markersize=3.5, label=panel.valid_name
    )
    for (name, loss), style in zip(panel.baselines.items(), _BASELINE_STYLES * len(panel.baselines), strict=False):
        axes.axhline(loss, color="0.35", linewidth=1, linestyle=style, label=f"{name} ({loss:.3f})")
    axes.set(title=panel.title, xlabel="step", ylabel=f"loss, {panel.unit}")
    _focus(axes, panel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def _focus(axes: Any, panel: LossPanel) -> None:
    """Leave the first steps' fall from chance out of view when it would flatten everything that follows."""
    shown = [loss for _, loss in (*panel.train[len(panel.train) // 10 :], *panel.valid[1:])]
    low, high = min((*shown, *panel.baselines.values())), max((*shown, *panel.baselines.values()))
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]


def _write_csv(panels: Sequence[LossPanel], destination: Path) -> None:
    with destination.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "series", "step", "loss"])
        for panel in panels:
            for series, curve in ((panel.train_name, panel.train), (panel.valid_name, panel.valid)):
                writer.writerows((panel.title, series, step, loss) for step, loss in curve)
            writer.writerows((panel.title, name, "", loss) for name, loss in panel.baselines.items())
