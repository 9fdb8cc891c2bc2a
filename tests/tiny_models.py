"""Small random models whose predictions differ enough between tokens that a wrong position or mask shows."""

from __future__ import annotations

import torch

from cistron.models.base import SequenceModel
from cistron.models.registry import build_model

EVO2 = {
    "model_type": "evo2",
    "hidden_size": 32,
    "layer_pattern": "SDH*H",
    "num_attention_heads": 2,
    "mlp_size": 48,
    "num_filter_groups": 8,
    "hcm_filter_length": 16,
    "max_length": 256,
}
ESM2 = {"model_type": "esm", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny_evo2(seed: int = 0, **changes: object) -> SequenceModel:
    return _random({**EVO2, **changes}, seed)


def tiny_esm2(seed: int = 0, **changes: object) -> SequenceModel:
    return _random({**ESM2, **changes}, seed)


def _random(config: dict[str, object], seed: int) -> SequenceModel:
    """Draw the matrices anew: the published initialisation predicts almost the same for every token."""
    model = build_model(config, dtype=torch.float32)
    model.init_weights(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and min(parameter.shape) > 16:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
        for name, buffer in model.named_buffers():
            if "contact_head" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model.eval()
