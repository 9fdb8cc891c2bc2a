from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from cistron_jobs.cli import JOBS, config_class_of, main


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_has_a_configuration_whose_fields_are_explained(name: str, capsys: pytest.CaptureFixture[str]):
    config_class = config_class_of(importlib.import_module(f"cistron_jobs.{name}"))
    unexplained = [field for field, info in config_class.model_fields.items() if not info.description]
    assert not unexplained
    assert main([name, "--help"]) == 0
    assert JOBS[name] in capsys.readouterr().out


def test_unknown_job_suggests_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["pretrian"]) == 2
    assert "did you mean 'pretrain'?" in capsys.readouterr().err


def test_misspelt_setting_fails_before_anything_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["pretrain", "model=evo2_tiny", "train.stesp=3", f"run_dir={tmp_path / 'run'}"]) == 1
    assert "train.stesp: no such setting; did you mean 'steps'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_configuration_file_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["pretrain", "nowhere.yaml"]) == 1
    assert "nowhere.yaml" in capsys.readouterr().err


def test_the_installed_command_reports_an_error_by_its_exit_status():
    command = [sys.executable, "-m", "cistron_jobs.cli", "generate", "model=missing", "num_tokens=4", "prompts=[ACGT]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_packaged_configuration_resolves(path: Path):
    from cistron_jobs.cli import parse

    job = path.stem.partition("-")[0]
    config = parse(config_class_of(importlib.import_module(f"cistron_jobs.{job}")), [str(path)])
    assert config.model_dump()
