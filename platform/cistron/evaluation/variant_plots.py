"""Pictures of variant scores: how the classes lie, and the ROC and precision-recall curves; a CSV beside each."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cistron.evaluation.variant_effect import Curve, Discrimination, Estimate

_COLOURS: Final = ("#e45756", "#f2a541", "#4c78a8", "#72b7b2", "#8d7ab5")
_GREY: Final = "0.45"
_JITTER: Final = 0.32
_DPI: Final = 300
_INTERVAL: Final = "(95 % bootstrap interval)"
_TITLE: Final = {"fontsize": "medium"}


def plot_strip(groups: Mapping[str, NDArray[np.float64]], destination: Path, *, title: str, label: str) -> Path:
    """Draw every score as a point, one row per group, with the groups' medians marked.

    Args:
        groups: scores by the name of their group, from the top down; a group may be empty.
        destination: PNG file; a CSV of the same name lists the points.
        title: of the picture.
        label: of the axis of the scores, with their unit.
    """
    figure = Figure(figsize=(7.2, 1.3 + 0.95 * len(groups)), layout="constrained")
    axes: Any = figure.subplots()
    generator = np.random.default_rng(0)
    names = [f"{name}\nn = {len(scores):,}" for name, scores in groups.items()]
    medians = {row: float(np.median(scores)) for row, scores in enumerate(groups.values()) if len(scores)}
    for row, scores in enumerate(groups.values()):
        colour = _COLOURS[row % len(_COLOURS)]
        heights = row + generator.uniform(-_JITTER, _JITTER, size=len(scores))
        axes.scatter(scores, heights, s=6, color=colour, alpha=0.45, linewidths=0, rasterized=True)
    for (row, median), text in zip(medians.items(), _alike(list(medians.values())), strict=True):
        axes.plot([median, median], [row - 0.42, row + 0.42], color="black", linewidth=2, zorder=3)
        names[row] += f"\nmedian {text}"
    axes.axvline(0, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_title(title, **_TITLE)
    axes.set(xlabel=label, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.45, -0.55))
    rows = ((name, score) for name, scores in groups.items() for score in scores.tolist())
    return _save(figure, axes, destination, ["group", "score"], rows)


def plot_roc(results: Mapping[str, Discrimination], destination: Path, *, title: str, positive: str) -> Path:
    """Draw the ROC curves of several scores of the same variants, and the diagonal of a guess."""
    figure, axes = _square()
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":", label="guess: 0.500")
    _draw(axes, {name: (result.roc, result.auroc) for name, result in results.items()})
    one = next(iter(results.values()))
    axes.set_title(title, **_TITLE)
    axes.set(
        xlabel=f"false-positive rate (others, n = {one.num_negatives:,})",
        ylabel=f"true-positive rate ({positive}, n = {one.num_positives:,})",
    )
    _legend(figure, f"AUROC {_INTERVAL}")
    return _save(figure, axes, destination, ["score", "x", "y"], _points(results, "roc"))


def plot_pr(results: Mapping[str, Discrimination], destination: Path, *, title: str, positive: str) -> Path:
    """Draw the precision-recall curves of several scores of the same variants, and the precision of a guess."""
    figure, axes = _square()
    one = next(iter(results.values()))
    share = one.num_positives / (one.num_positives + one.num_negatives)
    axes.axhline(share, color=_GREY, linewidth=1, linestyle=":", label=f"guess: {share:.3f}")
    # Steps, because average precision is their area: a line between two points would promise more.
    curves = {name: (_from_the_left(result.pr), result.auprc) for name, result in results.items()}
    _draw(axes, curves, drawstyle="steps-pre")
    total = f"{one.num_positives + one.num_negatives:,}"
    axes.set_title(title, **_TITLE)
    axes.set(xlabel=f"recall of {positive} (n = {one.num_positives:,} of {total})", ylabel="precision")
    _legend(figure, f"AUPRC {_INTERVAL}")
    return _save(figure, axes, destination, ["score", "x", "y"], _points(results, "pr"))


def _square() -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.2, 6.4), layout="constrained")
    axes: Any = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    return figure, axes


def _legend(figure: Figure, title: str) -> None:
    figure.legend(title=title, loc="outside lower center", frameon=False, fontsize="small", title_fontsize="small")


def _from_the_left(curve: Curve) -> Curve:
    return Curve(np.append(0.0, curve.x), np.append(curve.y[0], curve.y))


def _draw(axes: Any, curves: Mapping[str, tuple[Curve, Estimate]], drawstyle: str = "default") -> None:
    for (name, (curve, estimate)), colour in zip(curves.items(), _COLOURS[::-1][2:], strict=False):
        style = {"color": colour, "linewidth": 1.6, "drawstyle": drawstyle}
        axes.plot(curve.x, curve.y, label=f"{name}: {estimate}", clip_on=False, **style)


def _alike(values: Sequence[float]) -> list[str]:
    """Return numbers with as many decimals each: those that leave the largest three digits.

    >>> _alike([-6.25, -1.0]), _alike([0.0012345, 0.0])
    (['\u22126.25', '\u22121.00'], ['0.00123', '0.00000'])
    """
    largest = max(map(abs, values), default=0.0)
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    return [f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}") for value in values]


def _points(results: Mapping[str, Discrimination], kind: str) -> Iterable[Sequence[object]]:
    for name, result in results.items():
        curve: Curve = getattr(result, kind)
        yield from ((name, x, y) for x, y in zip(curve.x.tolist(), curve.y.tolist(), strict=True))


def _save(figure: Figure, axes: Any, destination: Path, header: list[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write the picture, and its points beside it."""
    axes.spines[["top", "right"]].set_visible(False)
    destination.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(destination, dpi=_DPI, bbox_inches="tight")
    with destination.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return destination
