"""``cistron selftest model=DIR``: does this model compute here what it should?

Any model is checked against itself: fast paths must equal the plain forward pass. A published Evo 2 checkpoint is also
checked against the numbers that its publishers' tests expect, as far as its name is known and the prompts are here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import Field
from rich.console import Console
from rich.table import Table

from cistron.errors import CapabilityError, InputError
from cistron.evaluation.exactness import Check, exactness_battery
from cistron.evaluation.published import PUBLISHED, published_checks
from cistron.io import storage
from cistron.io.fasta import read_fasta
from cistron.models.base import SequenceModel
from cistron.models.evo2.model import Evo2
from cistron.models.registry import get_spec, list_models
from cistron_jobs.model_config import ModelJobConfig, open_model

_PROMPTS: Final = Path(__file__).parent / "sample_data" / "evo2_prompts.fna.gz"


class SelftestConfig(ModelJobConfig):
    """Settings of ``cistron selftest``."""

    name: str | None = None
    """Registry name of the published checkpoint that this is; known already when `model` is such a name."""
    length: int = Field(default=1100, ge=2)
    """Tokens of the sequence that is run in chunks and step by step."""
    seed: int = Field(default=0, ge=0)
    """Of the random sequences."""
    run_dir: str | None = None
    """Folder of the result, summary.json; runs/selftest-<time> if not given."""


@dataclass(slots=True)
class Report:
    """What was checked, and what was not and why."""

    checks: list[Check] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if not check.passed]


def run(config: SelftestConfig) -> Report:
    """Check the model, show a table, and write ``summary.json``.

    Raises:
        CapabilityError: a check failed; the summary is written all the same.
        CistronError: the model or its name cannot be used.
    """
    name = _published_name(config)
    model = open_model(config)
    if config.name is not None:
        _check_name(config.name, model)
    report = Report()
    report.checks += exactness_battery(model, length=config.length, seed=config.seed)
    if isinstance(model, Evo2):
        _check_published(report, model, name)
    folder = config.run_dir or f"runs/selftest-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    summary = storage.join(folder, "summary.json")
    storage.write_text(summary, json.dumps(_summary(config, name, model, report), indent=2) + "\n")
    Console().print(_table(report), f"precision path: {model.precision_path}. Written to {summary}")
    if report.failed:
        raise CapabilityError(
            f"selftest: {len(report.failed)} of {len(report.checks)} checks failed: {'; '.join(report.failed)}"
        )
    return report


def published_prompts() -> dict[str, str]:
    """Return the packaged prompts by name: those of the published packages' own tests."""
    return {record.name: record.sequence for record in read_fasta(str(_PROMPTS))}


def _published_name(config: SelftestConfig) -> str | None:
    """Return the registry name of the checkpoint, if it is known."""
    if config.name is not None:
        return get_spec(config.name).name
    return config.model if config.model in list_models() else None


def _check_name(name: str, model: SequenceModel) -> None:
    """Refuse a model that cannot be the published one of that name."""
    if not isinstance(model, Evo2):
        raise InputError(f"name: published numbers are known for Evo 2, and this is {model.family}")
    get_spec(name).check_size(model.config, source="the model")


def _check_published(report: Report, model: Evo2, name: str | None) -> None:
    """Add the comparisons with published numbers, or why they are skipped."""
    everything = "published loss, accuracy and identity"
    if name is None:
        report.skipped[everything] = "name=... does not say which published checkpoint this is"
    elif (expected := PUBLISHED.get(name)) is None:
        report.skipped[everything] = f"no numbers are published for {name} (for: {', '.join(PUBLISHED)})"
    else:
        report.checks += published_checks(model, expected, published_prompts())


def _summary(config: SelftestConfig, name: str | None, model: SequenceModel, report: Report) -> dict[str, Any]:
    return {
        "settings": config.model_dump(mode="json"),
        "published_name": name,
        "precision_path": model.precision_path,
        "passed": not report.failed,
        "checks": [check.to_json() for check in report.checks],
        "skipped": report.skipped,
    }


def _table(report: Report) -> Table:
    table = Table("check", "measured", "limit", "", "detail")
    for check in report.checks:
        verdict = "ok" if check.passed else "FAILED"
        table.add_row(check.name, f"{check.measured:.2g}", f"{check.limit:.2g}", verdict, check.detail)
    for name, reason in report.skipped.items():
        table.add_row(name, "", "", "skipped", reason)
    return table
