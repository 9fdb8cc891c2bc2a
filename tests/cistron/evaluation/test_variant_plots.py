from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from cistron.evaluation.variant_effect import discrimination
from cistron.evaluation.variant_plots import plot_pr, plot_roc, plot_strip


def test_the_strip_lists_its_points_and_survives_an_empty_group(tmp_path: Path):
    groups = {"lost": np.array([-3.0, -1.5]), "kept": np.array([0.5]), "none": np.array([])}
    path = plot_strip(groups, tmp_path / "report" / "strip.png", title="t", label="score, nats")
    assert imread(path).std() > 0
    with path.with_suffix(".csv").open() as file:
        assert list(csv.reader(file)) == [["group", "score"], ["lost", "-3.0"], ["lost", "-1.5"], ["kept", "0.5"]]


@pytest.mark.parametrize(("plot", "kind"), [(plot_roc, "roc"), (plot_pr, "pr")])
def test_curves_list_their_points(tmp_path: Path, plot, kind: str):
    results = {
        "good": discrimination([True, False, True, False], [4.0, 1.0, 3.0, 2.0], resamples=10),
        "flat": discrimination([True, False, True, False], [1.0, 1.0, 1.0, 1.0], resamples=10),
    }
    path = plot(results, tmp_path / f"{kind}.png", title="t", positive="lost")
    assert imread(path).std() > 0
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, result in results.items():
        points = [(float(row["x"]), float(row["y"])) for row in rows if row["score"] == name]
        curve = getattr(result, kind)
        assert points == list(zip(curve.x.tolist(), curve.y.tolist(), strict=True))
