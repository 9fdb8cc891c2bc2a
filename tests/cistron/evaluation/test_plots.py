from __future__ import annotations

import csv
from pathlib import Path

from cistron.evaluation.plots import LossPanel, plot_losses


def test_losses_are_drawn_and_their_points_written(tmp_path: Path):
    panel = LossPanel(
        title="Evo 2",
        unit="nats per nucleotide",
        train=[(step, 5 / step) for step in range(1, 40)],
        valid=[(10, 0.6), (20, 0.3)],
        baselines={"order 0": 1.386, "order 3": 1.35},
    )
    picture = plot_losses([panel, panel], tmp_path / "report" / "losses.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with picture.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (39 + 2 + 2)
    assert {"model": "Evo 2", "series": "held out", "step": "20", "loss": "0.3"} in rows
