from __future__ import annotations

import json
import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.cistron.train.settings import tiny_run

from cistron.errors import CistronError
from cistron.parallel.mesh import World
from cistron.train.callbacks.callback import Run
from cistron.train.callbacks.jsonl import JsonlWriter
from cistron.train.callbacks.mirror import Mirror
from cistron.train.callbacks.progress import BarView, LineView
from cistron.train.callbacks.ray_metrics import GAUGES
from cistron.train.callbacks.tensorboard import TensorBoardWriter
from cistron.train.metrics import Meter, Metrics, StepResult, peak_flops

CPU = torch.device("cpu")


def run_at(step, rank=0):
    world = World(rank=rank, size=1, device=CPU)
    return Run(config=tiny_run("corpus", "run"), world=world, strategy=None, step=step)


def record(step, loss=1.5):
    return Metrics(
        step=step,
        loss=loss,
        grad_norm=0.5,
        learning_rate=0.1,
        tokens=10 * step,
        tokens_per_second=99.0,
        mfu=None,
        data_wait=0.25,
        seconds=2.0,
    )


def result(loss_sum, weight, *, norm=1.0, tokens=10, flops=4.0):
    return StepResult(
        loss_sum=torch.tensor(loss_sum),
        weight=weight,
        tokens=tokens,
        flops=flops,
        grad_norm=torch.tensor(norm),
        learning_rate=0.1,
        wait_s=0.0,
    )


def test_a_record_weighs_steps_by_their_targets():
    meter = Meter(World(rank=0, size=1, device=CPU), peak_flops=100.0)
    meter.add(result(30.0, 10.0))
    meter.add(result(2.0, 30.0, norm=7.0))
    metrics = meter.flush(step=2, tokens=20)
    assert metrics.loss == pytest.approx(32 / 40)
    assert metrics.grad_norm == 7.0
    assert metrics.tokens_per_second == pytest.approx(20 / metrics.seconds)
    assert metrics.mfu == pytest.approx(3 * 8.0 / (metrics.seconds * 100.0))


@pytest.mark.parametrize("fault", [result(float("nan"), 1.0), result(1.0, 1.0, norm=float("inf"))])
def test_divergence_ends_the_run(fault):
    meter = Meter(World(rank=0, size=1, device=CPU), peak_flops=None)
    meter.add(fault)
    with pytest.raises(CistronError, match="diverged before step 5"):
        meter.flush(step=5, tokens=1)


def test_a_cpu_has_no_peak_unless_told():
    assert peak_flops(CPU, None) is None
    assert peak_flops(CPU, 3e9) == 3e9


def test_jsonl_drops_what_a_restart_repeats(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.on_start(run_at(0))
    for step in (1, 2, 3):
        writer.on_metrics(run_at(step), record(step))
    writer.on_evaluation(run_at(2), {"valid_loss": 3.0})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1, "lo')  # Killed while writing.
    writer.on_start(run_at(2))
    writer.on_metrics(run_at(3), record(3, loss=9.0))
    writer.on_metrics(run_at(3, rank=1), record(3, loss=8.0))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("loss"), row.get("valid_loss")) for row in rows] == [
        (1, 1.5, None),
        (2, 1.5, None),
        (2, None, 3.0),
        (3, 9.0, None),
    ]
    assert rows[0]["data_wait"] == 0.25


def test_tensorboard_holds_both_curves(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.on_start(run_at(0))
    writer.on_metrics(run_at(4), record(4))
    writer.on_evaluation(run_at(4), {"valid_loss": 2.5})
    writer.on_end(run_at(4))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(4, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("valid/loss")] == [(4, 2.5)]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_every_number_of_a_record_has_a_gauge_or_a_reason():
    without = {"tokens", "seconds"}  # Prometheus derives both from the others.
    assert {f"cistron_train_{name}" for name in record(1).to_json() if name not in without} <= GAUGES.keys()


def test_lines_are_rare_but_the_last_one_is_there(caplog):
    caplog.set_level(logging.INFO)
    view = LineView("run", 10)
    for step in range(4):
        view.show(record(step).to_json())
    view.close()
    view.close()
    assert [line.split(",")[0] for line in caplog.messages] == ["run: step 0 of 10", "run: step 3 of 10"]


def test_a_bar_says_where_the_run_stands(capsys):
    view = BarView("run", 10)
    view.show(record(4).to_json())
    view.close()
    shown = capsys.readouterr()
    assert "4/10" in shown.err
    assert "loss 1.500" in shown.err
    assert not shown.out


def test_a_local_run_folder_is_written_in_place(tmp_path):
    mirror = Mirror(str(tmp_path))
    assert mirror.path == tmp_path
    mirror.on_end(run_at(3))


def test_a_remote_run_folder_gets_copies(tmp_path, monkeypatch):
    monkeypatch.setattr("cistron.io.storage.is_local", lambda path: False)
    (tmp_path / "metrics.jsonl").write_text("before\n")
    mirror = Mirror(str(tmp_path))
    assert mirror.path != tmp_path
    with (mirror.path / "metrics.jsonl").open("a") as stream:
        stream.write("after\n")
    mirror.on_step(run_at(4))
    assert (tmp_path / "metrics.jsonl").read_text() == "before\n"
    mirror.on_step(run_at(6))
    assert (tmp_path / "metrics.jsonl").read_text() == "before\nafter\n"
    mirror.on_end(run_at(6))
    assert not mirror.path.exists()
