"""What the readers of foreign settings share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cistron.errors import ConfigError

FP8_OPTIONAL_WIDTH: Final = 4096
"""The 7B family asks for FP8 projections like the others, but is known not to need them."""


def need(settings: Mapping[str, Any], key: str, *, source: Path) -> Any:
    """Return a setting that has no default.

    Raises:
        ConfigError: it is not there.
    """
    if settings.get(key) is None:
        raise ConfigError(f"{source}: the source's configuration has no {key}")
    return settings[key]


def check_constants(settings: Mapping[str, Any], expected: Mapping[str, Any], *, source: Path) -> None:
    """Check what every Evo 2 shares.

    Raises:
        ConfigError: a setting has another value.
    """
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise ConfigError(f"{source}: {key}: Evo 2 has {value!r}, got {settings[key]!r}; this is another model")


def is_native(settings: Mapping[str, Any]) -> bool:
    """Return whether settings are in our own field names, which the formats' do not share."""
    return not settings.keys().isdisjoint({"model_type", "layer_pattern"})
