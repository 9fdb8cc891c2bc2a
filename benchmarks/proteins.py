"""The proteins that benchmarks draw from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_SAMPLE: Final = Path(__file__).parents[1] / "jobs/cistron_jobs/sample_data/uniprot_2k.fasta.gz"


def proteins_file() -> Path:
    """Return the FASTA file that CISTRON_PROTEINS names, or the packaged sample."""
    return Path(os.environ.get("CISTRON_PROTEINS", _SAMPLE))
