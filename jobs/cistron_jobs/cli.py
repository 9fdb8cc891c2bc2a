"""The `cistron` command: ``cistron <job> [config.yaml] [key=value ...]``.

A job is a module of this package with ``run(config)``; the annotation of `config` is its configuration class. Only the
chosen job is imported, so ``cistron --help`` answers at once. The file may lie anywhere that
:mod:`cistron.io.storage` reads, so ``ray job submit -- cistron pretrain s3://bucket/run.yaml train.steps=500`` works.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any, Final, get_type_hints

from cistron import __version__
from cistron.config import Config, help_text, merge, parse_overrides, parse_yaml, resolve
from cistron.errors import CistronError, nearest
from cistron.io.storage import read_text

JOBS: Final = {
    "convert": "convert a checkpoint between formats",
    "demo": "prepare, train, evaluate, export and serve both models, small but real",
    "embed": "embed the sequences of a FASTA file",
    "evaluate": "measure a model on held-out sequence or on variants, beside honest baselines",
    "generate": "continue DNA prompts",
    "prepare_data": "turn FASTA or Parquet into tokenised shards",
    "pretrain": "train a model on prepared shards",
    "protein_variants": "score substitutions in proteins: those of a table, or all of them",
    "score": "score the sequences of a FASTA file",
    "selftest": "check that a model computes what it should, against itself and published numbers",
    "serve": "serve models over HTTP",
    "variants": "score DNA variants of a VCF or table, into Parquet and an annotated VCF",
}
"""Every job with its one-line help."""

EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130


def main(words: Sequence[str] | None = None) -> int:
    """Run one job; return the exit status: 0, 1 for a refused input, 2 for a wrong command, 130 when interrupted."""
    arguments = list(sys.argv[1:] if words is None else words)
    if not arguments or arguments[0] in {"-h", "--help"}:
        sys.stdout.write(_usage())
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"cistron {__version__}\n")
        return 0
    name, *rest = arguments
    if name not in JOBS:
        return _fail(f"unknown job {name!r}{nearest(name, JOBS)} (known: {', '.join(JOBS)})", EXIT_USAGE)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    for package in ("cistron", "cistron_jobs", "cistron_serve"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        return _run(name, rest)
    except CistronError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def parse(config_class: type[Config], words: Sequence[str]) -> Config:
    """Resolve ``[config.yaml] [key=value ...]`` against `config_class`; later words win over the file.

    Raises:
        ConfigError: an unreadable file or word, or a fault in a setting.
    """
    file = words[0] if words and "=" not in words[0] else None
    settings = parse_yaml(read_text(file), source=file) if file else {}
    return resolve(config_class, merge(settings, parse_overrides(words[1:] if file else words)))


def _run(name: str, words: Sequence[str]) -> int:
    module = importlib.import_module(f"cistron_jobs.{name}")
    config_class = config_class_of(module)
    if {"-h", "--help"} & set(words):
        sys.stdout.write(f"cistron {name} [config.yaml] [key=value ...]: {JOBS[name]}\n\n{help_text(config_class)}\n")
        return 0
    module.run(parse(config_class, words))
    return 0


def config_class_of(module: Any) -> type[Config]:
    """Return the configuration class of a job module."""
    config_class = get_type_hints(module.run)["config"]
    assert issubclass(config_class, Config), f"{module.__name__}.run must take a Config"
    return config_class


def _usage() -> str:
    width = max(map(len, JOBS))
    lines = [f"  {name:<{width}}  {text}" for name, text in JOBS.items()]
    return "\n".join(
        [
            "usage: cistron <job> [config.yaml] [key=value ...]",
            "",
            *lines,
            "",
            "`cistron <job> --help` lists a job's settings.",
            "",
        ]
    )


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
