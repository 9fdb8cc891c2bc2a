"""Whether weights need FP8 projections, where the settings beside them do not say it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cistron.models.evo2.config import Evo2Config
from cistron.models.published import all_specs

logger = logging.getLogger(__name__)

OWN_WORD: Final = "requires_fp8"
"""Decides it in the settings of any format."""
_FORMATS_WORD: Final = "use_fp8_input_projections"
"""Of vortex and savanna. Megatron-Bridge's ``vortex_style_fp8`` says how one run computed, not what weights need."""


def with_known_need(config: Evo2Config, settings: Mapping[str, Any], path: Path) -> Evo2Config:
    """Return `config` with the need for FP8 of the released model that it has the shape of.

    Weights that need FP8 and do not say so would be run without, and their numbers would be wrong without a word. Of
    some shapes there are also weights that were tuned to do without it, hence the note.

    Args:
        config: as the format's settings say.
        settings: those settings; ``requires_fp8`` among them decides.
        path: the source, for the note.

    Raises:
        ConfigError: ``requires_fp8`` is neither true nor false.
    """
    said = {key.replace("-", "_"): value for key, value in settings.items() if value is not None}
    if OWN_WORD in said:
        return Evo2Config.from_json({**config.to_json(), OWN_WORD: said[OWN_WORD]})
    released = None if config.requires_fp8 or _FORMATS_WORD in said else _sensitive_like(config)
    if released is None:
        return config
    logger.warning(
        "%s has the shape of %s and is taken to need FP8 input projections as that does; if these weights were tuned "
        "to do without, pass config= with requires_fp8: false",
        path,
        released,
    )
    return config.model_copy(update={OWN_WORD: True})


def _sensitive_like(config: Evo2Config) -> str | None:
    """Return the name of a released model of this shape that needs FP8."""
    return next(
        (
            spec.name
            for spec in all_specs()
            if isinstance(spec.config, Evo2Config)
            and spec.config.requires_fp8
            and _shape(spec.config) == _shape(config)
        ),
        None,
    )


def _shape(config: Evo2Config) -> tuple[object, ...]:
    return config.hidden_size, config.layer_pattern, config.mlp_size, config.mlp_activation
