"""The main job as a newcomer runs it, with fewer steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import cistron
from cistron.io.fasta import read_fasta
from cistron_jobs import demo as demo_job
from cistron_jobs.cli import main
from cistron_jobs.demo_recipes import RECIPES
from cistron_jobs.evaluate import EvaluateConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def processes_with(mark: str) -> list[str]:
    """Command lines of living processes that inherited the environment variable `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """Run folder, printed text, and processes left behind."""
    folder, mark = tmp_path_factory.mktemp("demo") / "run", uuid.uuid4().hex
    environment = {**os.environ, "CISTRON_TEST_MARK": mark}
    environment.pop("RAY_ADDRESS", None)
    words = ["demo", f"run_dir={folder}", "dna_steps=4", "protein_steps=4", "dashboard=true"]
    command = [sys.executable, "-m", "cistron_jobs.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 15
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return folder, done.stdout + done.stderr, left


def test_it_learns_evaluates_and_answers(demo: tuple[Path, str, list[str]]):
    folder, text, _ = demo
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["models"]) == {"evo2-demo", "esm2-demo"}
    for losses in summary["models"].values():
        assert len(losses) == 3
        assert all(0 < loss < 7 for loss in losses.values())
    assert len(summary["endpoints"]) == 9
    assert {answer["status"] for answer in summary["endpoints"]} == {200}
    assert "Ray dashboard: http://" in text
    assert "What the service answered" in text


def test_it_leaves_a_report_and_checkpoints_that_load(demo: tuple[Path, str, list[str]]):
    folder, _, _ = demo
    assert (folder / "report" / "losses.png").read_bytes().startswith(b"\x89PNG")
    for name, family in (("evo2-demo", "evo2"), ("esm2-demo", "esm2")):
        assert cistron.load_model(folder / name / "export").family == family
        records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"} <= set(records[0])
        assert list((folder / name / "tensorboard").iterdir())


def test_it_leaves_no_process(demo: tuple[Path, str, list[str]]):
    assert demo[2] == []


def test_an_existing_folder_is_refused(demo: tuple[Path, str, list[str]], capsys: pytest.CaptureFixture[str]):
    assert main(["demo", f"run_dir={demo[0]}"]) == 1
    assert f"run_dir: {demo[0]} exists" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_models_and_baselines_are_measured_as_in_training(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the masks of the run's own held-out losses, and baselines that count all of the training split."""
    asked: list[EvaluateConfig] = []
    monkeypatch.setattr(demo_job.prepare_data, "run", lambda config: None)
    monkeypatch.setattr(demo_job.pretrain, "run", lambda config: None)
    monkeypatch.setattr(demo_job.evaluate, "run", lambda config: asked.append(config) or {"loss": {}})
    demo_job._learn(recipe, tmp_path / recipe.name, 4, {})
    (config,) = asked
    assert (config.seed, config.protocol) == (0, "hidden")
    length = recipe.data["max_length"] if recipe.corpus["alphabet"] == "dna" else None
    records = (record for path in recipe.prepare(tmp_path)["input"] for record in read_fasta(path))
    documents = sum(-(-len(record.sequence) // length) if length else 1 for record in records)
    assert config.baseline_samples is not None
    assert documents + 500 < config.baseline_samples, "rows of the corpus end inside windows, a few hundred times"
