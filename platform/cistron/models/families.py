"""The two model families, by the ``model_type`` that a configuration carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias, cast

import torch

from cistron.errors import ConfigError, nearest
from cistron.models.base import SequenceModel
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2
from cistron.models.esm2.tokenizer_files import TOKENIZER_FILES
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.model import Evo2

ModelConfig: TypeAlias = Evo2Config | Esm2Config


FAMILIES: Final[Mapping[str, type[Evo2Config] | type[Esm2Config]]] = {"evo2": Evo2Config, "esm": Esm2Config}
"""Configuration classes by ``model_type``; ESM-2 says ``esm``, as Hugging Face does."""


def parse_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that `settings` describe: ``model_type`` and the fields of that family.

    Raises:
        ConfigError: no or unknown ``model_type``, or a setting that the family refuses.
    """
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        guess = nearest(str(model_type), FAMILIES)
        raise ConfigError(f"model_type: unknown model family {model_type!r}{guess} (known: {', '.join(FAMILIES)})")
    return FAMILIES[model_type].from_json(settings)


def build(
    config: ModelConfig, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> SequenceModel:
    """Return a model of `config`."""
    if isinstance(config, Evo2Config):
        return Evo2(config, device=device, dtype=dtype)
    return Esm2(config, device=device, dtype=dtype)


def companion_files(config: ModelConfig) -> Mapping[str, str]:
    """Return the texts of the files, by name, that stand beside the weights for other software."""
    return TOKENIZER_FILES if isinstance(config, Esm2Config) else {}


def config_of(model: SequenceModel) -> ModelConfig:
    """Return a model's configuration under its precise type."""
    return cast(ModelConfig, model.config)
