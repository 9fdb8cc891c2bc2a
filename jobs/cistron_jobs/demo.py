"""The main job: from a genome to a served model, small but real, in a few minutes on two cores.

Packaged sequences (E. coli K-12, phage lambda, 2,000 UniProt proteins) become shards; a small Evo 2 learns with FSDP2
and a small ESM-2 with ZeRO-2, two workers each; both are measured on held-out sequence beside models that only count
letters; both are served, and each endpoint is called over HTTP. The losses are the same each time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pydantic import Field
from rich.console import Console
from rich.table import Table

from cistron.config import Config, resolve
from cistron.errors import ConfigError
from cistron.evaluation.plots import LossPanel, plot_losses
from cistron.train.config import PretrainConfig
from cistron_jobs import evaluate, prepare_data, pretrain
from cistron_jobs.demo_recipes import RECIPES, Recipe
from cistron_jobs.demo_requests import Answer, call_every_endpoint
from cistron_jobs.ray_session import ray_session

logger = logging.getLogger(__name__)

LOGICAL_CPUS: Final = 8
"""Ray's view of the machine: more than the workers hold, so that reading never waits for training."""


class DemoConfig(Config):
    """The main job."""

    run_dir: str | None = None
    """Folder of the run, which must not exist yet; runs/demo-<time> if not given."""
    dna_steps: int = Field(default=RECIPES[0].steps, gt=0)
    """Optimiser steps of the small Evo 2."""
    protein_steps: int = Field(default=RECIPES[1].steps, gt=0)
    """Optimiser steps of the small ESM-2."""
    port: int = Field(default=0, ge=0, le=65_535)
    """Port of the HTTP service; 0 takes a free one."""
    dashboard: bool = True
    """Start Ray's dashboard and print its address."""


def run(config: DemoConfig) -> Path:
    """Run the demo; return its folder.

    Raises:
        ConfigError: the run folder exists.
    """
    folder = _new_folder(config.run_dir)
    timings: dict[str, float] = {}
    steps = {RECIPES[0].name: config.dna_steps, RECIPES[1].name: config.protein_steps}
    with ray_session(num_cpus=LOGICAL_CPUS, dashboard=config.dashboard) as dashboard_url:
        if dashboard_url:
            logger.info("Ray dashboard: %s", dashboard_url)
        results = [_learn(recipe, folder / recipe.name, steps[recipe.name], timings) for recipe in RECIPES]
        with _timed(timings, "serve"):
            exports = {recipe.name: folder / recipe.name / "export" for recipe in RECIPES}
            answers = call_every_endpoint(exports, port=config.port)
    picture = plot_losses(
        [_panel(recipe, folder, results[i]) for i, recipe in enumerate(RECIPES)], folder / "report" / "losses.png"
    )
    summary = {
        "models": {recipe.name: result for recipe, result in zip(RECIPES, results, strict=True)},
        "endpoints": [answer.to_json() for answer in answers],
        "seconds": {name: round(seconds, 1) for name, seconds in timings.items()},
        "report": str(picture.relative_to(folder)),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _show(results, answers, timings, folder)
    return folder


def _learn(recipe: Recipe, folder: Path, steps: int, timings: dict[str, float]) -> dict[str, float]:
    """Prepare the recipe's data, train, and return the losses of the held-out sequence."""
    corpus = folder.with_name(f"{folder.name}-corpus")
    with _timed(timings, f"prepare {recipe.name}"):
        prepare_data.run(resolve(prepare_data.PrepareDataConfig, recipe.prepare(corpus)))
    with _timed(timings, f"train {recipe.name}"):
        pretrain.run(resolve(PretrainConfig, recipe.pretrain(corpus, folder, steps)))
    with _timed(timings, f"evaluate {recipe.name}"):
        settings = {"model": str(folder / "export"), "data": str(corpus), "max_length": recipe.data["max_length"]}
        # As the run's own held-out losses were measured: the baselines are drawn beside those.
        settings |= {"seed": 0, "protocol": "hidden"}
        return evaluate.run(resolve(evaluate.EvaluateConfig, settings))["loss"]


def _panel(recipe: Recipe, folder: Path, losses: dict[str, float]) -> LossPanel:
    records = [json.loads(line) for line in (folder / recipe.name / "metrics.jsonl").read_text().splitlines()]
    return LossPanel(
        title=recipe.title,
        unit=recipe.unit,
        train=[(record["step"], record["loss"]) for record in records if "loss" in record],
        valid=[(record["step"], record["valid_loss"]) for record in records if "valid_loss" in record],
        baselines=_baselines(losses),
        train_name=recipe.curves[0],
        valid_name=recipe.curves[1],
    )


def _baselines(losses: dict[str, float]) -> dict[str, float]:
    return {name: loss for name, loss in losses.items() if name != "model"}


def _new_folder(run_dir: str | None) -> Path:
    folder = Path(run_dir or f"runs/demo-{datetime.now(UTC):%Y%m%d-%H%M%S}").absolute()
    if folder.exists():
        raise ConfigError(f"run_dir: {folder} exists; the demo starts from nothing, so give it a new folder")
    folder.mkdir(parents=True)
    return folder


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    logger.info("%s ...", name)
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start


def _show(results: list[dict[str, float]], answers: list[Answer], timings: dict[str, float], folder: Path) -> None:
    """Print the tables that the demo ends with."""
    console = Console()
    losses = Table("model", "loss on held-out sequence", "beside", title="What the models learnt", title_justify="left")
    for recipe, result in zip(RECIPES, results, strict=True):
        beside = ", ".join(f"{name} {loss:.4f}" for name, loss in _baselines(result).items())
        losses.add_row(recipe.title, f"{result['model']:.4f} {recipe.unit}", beside)
    calls = Table("request", "status", "ms", "answer", title="What the service answered", title_justify="left")
    for answer in answers:
        calls.add_row(answer.request, str(answer.status), f"{answer.milliseconds:.0f}", answer.digest)
    console.print(losses)
    console.print(calls)
    console.print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items()))
    console.print(f"Everything is in {folder}: summary.json, report/losses.png, and a checkpoint in each export/")
