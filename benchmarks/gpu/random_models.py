"""Whole models with random weights, drawn on the device: drawing billions of numbers on the host would take minutes."""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2, rotary_frequencies
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.initial import initial_tensor
from cistron.models.evo2.model import Evo2
from cistron.models.published import all_specs

_LARGE: Final = 1 << 20
"""Tensors with more elements than this are matrices."""


def config_of(name: str) -> Evo2Config | Esm2Config:
    """Return the configuration of a model in the registry."""
    return next(spec.config for spec in all_specs() if spec.name == name)


def random_evo2(name: str, *, device: torch.device, dtype: torch.dtype, **changes: Any) -> Evo2:
    """Return an Evo 2 of the named shape: filters as a fresh model has them, matrices of the same deviation."""
    config = config_of(name)
    assert isinstance(config, Evo2Config), f"{name} is not an Evo 2"
    config = Evo2Config.from_json({**config.to_json(), **changes})
    model = Evo2(config, device="meta", dtype=dtype).to_empty(device=device)
    with torch.no_grad():
        for key, tensor in model.state_dict(keep_vars=True).items():
            if tensor.numel() > _LARGE:
                tensor.normal_(std=math.sqrt(2 / (5 * config.hidden_size)))
            else:
                tensor.copy_(initial_tensor(config, key, tensor.shape, seed=0))
    return model


def random_esm2(name: str, *, device: torch.device, dtype: torch.dtype, **changes: Any) -> Esm2:
    """Return an ESM-2 of the named shape with normally distributed matrices."""
    config = config_of(name)
    assert isinstance(config, Esm2Config), f"{name} is not an ESM-2"
    config = Esm2Config.from_json({**config.to_json(), **changes})
    model = Esm2(config, device="meta", dtype=dtype).to_empty(device=device)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if model.decays(key):
                parameter.normal_(std=config.initializer_range)
            else:
                parameter.fill_(1.0 if key.endswith("weight") else 0.0)
        model.esm.rotary_embeddings.inv_freq.copy_(rotary_frequencies(config))
        for buffer in model.esm.contact_head.buffers():
            buffer.zero_()
    return model
