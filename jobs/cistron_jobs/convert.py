"""Convert a checkpoint between formats."""

from __future__ import annotations

import logging
from pathlib import Path

from cistron.config import Config
from cistron.models.convert import convert_checkpoint
from cistron.models.detect import AUTO, NATIVE
from cistron.models.evo2.config import Parametrization

logger = logging.getLogger(__name__)


class ConvertConfig(Config):
    """Settings of ``cistron convert``."""

    source: str
    """File or folder to convert."""
    destination: str
    """What to write; must not exist yet."""
    source_format: str = AUTO
    """vortex, savanna, mbridge (Evo 2), hf, fair-esm, bionemo-te (ESM-2), cistron; auto tells by the files."""
    target_format: str = NATIVE
    """The same choice, except auto. A fair-esm destination that ends in .pt is what fair-esm itself loads."""
    config: str | None = None
    """JSON or YAML file with the source's configuration in its own field names, where the source does not say."""
    parametrization: Parametrization | None = None
    """Form of Evo 2's filters: inference, or the factors that training learns; as in the source if not given."""
    trust_pickle: bool = False
    """Let a pickled source run code of its own; only for files whose origin you trust."""


def run(config: ConvertConfig) -> Path:
    """Convert, and return the destination.

    Raises:
        CistronError: a source that cannot be used; nothing is left at the destination.
    """
    destination = convert_checkpoint(
        config.source,
        config.destination,
        source_format=config.source_format,
        target_format=config.target_format,
        config=config.config,
        trust_pickle=config.trust_pickle,
        parametrization=config.parametrization,
    )
    logger.info("%s (%s) -> %s (%s)", config.source, config.source_format, destination, config.target_format)
    return destination
