"""The published shapes of Evo 2 and ESM-2, and two tiny ones for tests and demonstrations.

Evo 2: Arc Institute's releases, then NVIDIA's variants of them. ESM-2: Meta's sizes under their fair-esm names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from cistron.errors import CheckpointError
from cistron.models.esm2.config import Esm2Config
from cistron.models.evo2.config import Evo2Config
from cistron.models.families import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A named model.

    Attributes:
        name: its name in the registry.
        family: ``evo2`` or ``esm2``.
        config: its shape.
        published_parameters: number of parameters that its publishers' files hold, tied ones once and ESM-2's contact
            head not counted; None where nothing is published.
        sources: where its weights are published.
    """

    name: str
    family: Literal["evo2", "esm2"]
    config: ModelConfig
    published_parameters: int | None
    sources: tuple[str, ...] = ()

    def check_size(self, config: ModelConfig, *, source: str) -> None:
        """Refuse another model under this one's name; context and rotary settings may have been changed.

        Raises:
            CheckpointError: `config`, found at `source`, has another family, width, depth or layer pattern.
        """
        for setting in _SIZE:
            got, expected = (getattr(found, setting, None) for found in (config, self.config))
            if got != expected:
                raise CheckpointError(f"{source} is not {self.name}: {setting} is {got}, of {self.name} {expected}")


_SIZE: Final = ("model_type", "hidden_size", "num_layers", "layer_pattern")

ALIASES: Final[Mapping[str, str]] = {
    "esm2_8m": "esm2_t6_8M_UR50D",
    "esm2_35m": "esm2_t12_35M_UR50D",
    "esm2_150m": "esm2_t30_150M_UR50D",
    "esm2_650m": "esm2_t33_650M_UR50D",
    "esm2_3b": "esm2_t36_3B_UR50D",
    "esm2_15b": "esm2_t48_15B_UR50D",
}
"""Short names, each of one model only."""

UNPUBLISHED: Final[Mapping[str, str]] = dict.fromkeys(
    ("esm2_20b", "esm2_t64_20B", "esm2_t64_20B_UR50D"), "esm2_20b_unpublished"
)
"""Names under which people look for a model that nobody published, and the name of its shape here."""

_CONTEXT_8K: Final = 8_192
_CONTEXT_262K: Final = 262_144
_CONTEXT_1M: Final = 1_048_576

_PATTERN_7B: Final = "SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*"
_PATTERN_40B: Final = "SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*SDH*SDHSDH*SDHSDH*"
_PATTERN_1B: Final = _PATTERN_7B[:25]
_PATTERN_20B: Final = _PATTERN_40B[:24]
"""One letter per layer: S, D and H are the short, medium and long Hyena operators, * is attention."""

_1B: Final = {
    "hidden_size": 1920,
    "layer_pattern": _PATTERN_1B,
    "num_attention_heads": 15,
    "mlp_size": 5120,
    "num_filter_groups": 128,
    "rotary_base": 1e4,
    "max_length": _CONTEXT_8K,
}
_7B: Final = {
    "hidden_size": 4096,
    "layer_pattern": _PATTERN_7B,
    "num_attention_heads": 32,
    "mlp_size": 11_008,
    "num_filter_groups": 256,
    "rotary_base": 1e4,
    "max_length": _CONTEXT_8K,
}
_40B: Final = {
    "hidden_size": 8192,
    "layer_pattern": _PATTERN_40B,
    "num_attention_heads": 64,
    "mlp_size": 21_888,
    "num_filter_groups": 512,
    "rotary_base": 1e6,
    "max_length": _CONTEXT_8K,
}
_1M: Final = {"mlp_size": 22_528, "rotary_scaling": 128.0, "max_length": _CONTEXT_1M}
"""Context extension: linear position interpolation at the unchanged base, and an MLP padded for tensor parallelism."""

_ARC: Final = "https://huggingface.co/arcinstitute/"
_ARC_SHAPES: Final[Mapping[str, tuple[int, dict[str, Any], str]]] = {
    "evo2_1b_base": (1_107_989_760, {**_1B, "requires_fp8": True}, f"{_ARC}evo2_1b_base"),
    "evo2_7b_base": (6_481_059_584, _7B, f"{_ARC}evo2_7b_base"),
    "evo2_7b_262k": (
        6_481_059_584,
        {**_7B, "rotary_scaling": 32.0, "max_length": _CONTEXT_262K},
        f"{_ARC}evo2_7b_262k",
    ),
    "evo2_7b": (6_581_722_880, {**_7B, **_1M, "mlp_size": 11_264}, f"{_ARC}evo2_7b"),
    "evo2_7b_microviridae": (6_481_059_584, _7B, "https://huggingface.co/evo-design/evo-2-7b-8k-microviridae"),
    "evo2_20b": (
        19_738_780_160,
        {**_40B, **_1M, "layer_pattern": _PATTERN_20B, "requires_fp8": True},
        f"{_ARC}evo2_20b",
    ),
    "evo2_40b_base": (40_331_142_144, {**_40B, "requires_fp8": True}, f"{_ARC}evo2_40b_base"),
    "evo2_40b": (41_117_574_144, {**_40B, **_1M, "requires_fp8": True}, f"{_ARC}evo2_40b"),
}

_NV: Final = {
    "mlp_activation": "gelu",
    "attention_output_bias": False,
    "hcs_bias": True,
    "norm_eps_inside": True,
}
"""What NVIDIA changed: GELU in every layer, no bias after attention, one in the short operator; and its norm."""

_TEST: Final = {**_7B, "layer_pattern": "SDH*", "norm_eps_inside": True}
_NVIDIA_SHAPES: Final[Mapping[str, dict[str, Any]]] = {
    "striped_hyena_1b_nv": {**_1B, **_NV},
    "striped_hyena_7b_nv": {**_7B, **_NV, "mlp_size": 11_264, "rotary_base": 1e6},
    "striped_hyena_40b_nv": {**_40B, **_NV, "mlp_size": 22_528},
    # Fifteen heads cannot be split between GPUs; this shape of the same size has sixteen.
    "striped_hyena_1b_nv_parallel": {
        **_1B,
        **_NV,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "tie_embeddings": False,
        "embedding_init_std": 1.0,
    },
    "striped_hyena_test": _TEST,
    "striped_hyena_test_nv": {**_TEST, **_NV},
}

_SMALL: Final = {"layer_pattern": _PATTERN_7B[:11], "num_filter_groups": 64, "max_length": _CONTEXT_8K}
_UNRELEASED_SHAPES: Final[Mapping[str, dict[str, Any]]] = {
    "shc-evo2-50m": {**_SMALL, "hidden_size": 640, "num_attention_heads": 10, "mlp_size": 1792},
    "shc-evo2-100m": {
        **_SMALL,
        "layer_pattern": f"{_PATTERN_7B[:14]}*",
        "hidden_size": 768,
        "num_attention_heads": 12,
        "mlp_size": 2048,
    },
}
"""Small shapes that Arc Institute published settings of, without weights; heads of 64 channels."""

_META: Final = "https://huggingface.co/facebook/"
_ESM2_SHAPES: Final[Mapping[str, tuple[int, int, int, int]]] = {
    "esm2_t6_8M_UR50D": (6, 20, 320, 7_512_353),
    "esm2_t12_35M_UR50D": (12, 20, 480, 33_501_153),
    "esm2_t30_150M_UR50D": (30, 20, 640, 148_139_553),
    "esm2_t33_650M_UR50D": (33, 20, 1280, 651_042_593),
    "esm2_t36_3B_UR50D": (36, 40, 2560, 2_839_004_193),
    "esm2_t48_15B_UR50D": (48, 40, 5120, 15_129_098_273),
}
"""Layers, heads, width and parameters."""

_ESM2_20B: Final = (64, 40, 5120)
"""Layers, heads and width of a model of 20 billion parameters, of which speeds have been reported, and nothing else:
the shape is the one of 15B's width that has so many, and a guess."""


def all_specs() -> Iterator[ModelSpec]:
    """Yield every named model."""
    for name, (parameters, shape, source) in _ARC_SHAPES.items():
        yield ModelSpec(name, "evo2", Evo2Config(**shape), parameters, (source,))
    for name, shape in {**_NVIDIA_SHAPES, **_UNRELEASED_SHAPES}.items():
        yield ModelSpec(name, "evo2", Evo2Config(**shape), None)
    for name, (layers, heads, width, parameters) in _ESM2_SHAPES.items():
        yield ModelSpec(name, "esm2", _esm2(layers, heads, width), parameters, (f"{_META}{name}",))
    yield ModelSpec("esm2_20b_unpublished", "esm2", _esm2(*_ESM2_20B), None)
    yield from _tiny_specs()


def _esm2(layers: int, heads: int, width: int) -> Esm2Config:
    return Esm2Config(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_size=width, intermediate_size=4 * width
    )


def _tiny_specs() -> Iterator[ModelSpec]:
    """Yield shapes that train on a laptop; nobody publishes weights for them."""
    evo2 = Evo2Config(
        hidden_size=64,
        layer_pattern="SDH*SDH",
        num_attention_heads=4,
        mlp_size=176,
        num_filter_groups=16,
        rotary_base=1e4,
        max_length=_CONTEXT_8K,
    )
    yield ModelSpec("evo2_tiny", "evo2", evo2, None)
    yield ModelSpec("esm2_tiny", "esm2", _esm2(4, 4, 64), None)
