"""The FP8 scales of Evo 2's input projections, as Transformer Engine leaves them in a checkpoint.

A layer's state is a pickled dictionary of scales, histories and the recipe that made them, as bytes or as a ``uint8``
tensor of bytes. Inference needs two numbers of it: by what the input and the weight are multiplied before they are
rounded. They are read without running what the pickle asks for, and become native tensors. Histories and recipe are
dropped: a forward pass with static scales does not look at them.
"""

from __future__ import annotations

import io
import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from cistron.errors import CheckpointError
from cistron.models.unpickling import TENSORS, restricted_loads

logger = logging.getLogger(__name__)

INPUT_SCALE: Final = "mixer.projection.fp8.input_scale"
WEIGHT_SCALE: Final = "mixer.projection.fp8.weight_scale"
STATE_NAMES: Final = (INPUT_SCALE, WEIGHT_SCALE)
"""Native names, in a block, of the two numbers; their order is that of Transformer Engine's ``scale_fwd``."""

_ALLOWED: Final = {**TENSORS, "_io.BytesIO": io.BytesIO}
_UNSCALED: Final = (1.0, 1.0)
_HISTORY_LENGTH: Final = 16
_NUM_FORWARD, _NUM_BACKWARD = 3, 2
"""Tensors that a linear layer scales: input, weight and output, and the gradients of two of them."""


def read_scales(states: Mapping[int, Sequence[bytes]], *, path: Path) -> dict[int, tuple[float, float]] | None:
    """Return the input and weight scale of every Hyena layer, or None when the file holds no usable state.

    A matrix that is split into shards has a weight scale for each; the smallest is the whole matrix's, as a scale is
    inversely proportional to the largest value.

    Args:
        states: the states of each Hyena layer, one per shard, by the layer's index.
        path: where they come from, for messages.

    Raises:
        CheckpointError: some layers' states can be read and others' cannot, or a scale is not a positive number.
    """
    found, unreadable = {}, {}
    for index, shards in states.items():
        try:
            scales = [parsed for data in shards if (parsed := parse_state(data)) is not None]
        except CheckpointError as error:
            unreadable[index] = error
            continue
        if scales:
            found[index] = min(scale for scale, _ in scales), min(scale for _, scale in scales)
    if unreadable:
        index, fault = next(iter(unreadable.items()))
        if found:
            raise CheckpointError(f"{path}: the FP8 state of layer {index} cannot be read, others can: {fault}")
        logger.warning("%s: dropping the FP8 states, which cannot be read (layer %d: %s)", path, index, fault)
    if not found:
        return None
    if absent := sorted(states.keys() - found.keys()):
        logger.info("%s: layers %s have no FP8 state; their scales are 1", path, absent)
    return {index: found.get(index, _UNSCALED) for index in states}


def parse_state(data: bytes) -> tuple[float, float] | None:
    """Return the input and the weight scale that a layer's state holds; None when it holds none.

    Raises:
        CheckpointError: the bytes are no such state, name something that it has no need of, or hold a scale that is
            not a positive number.
    """
    if not data:
        return None
    try:
        state = restricted_loads(data, _ALLOWED, ignored={"transformer_engine"})
    except Exception as error:  # Foreign bytes fail in any way they like.
        raise CheckpointError(f"no state of an FP8 layer: {error}") from error
    if isinstance(state, io.BytesIO):
        return parse_state(state.getvalue())
    if isinstance(state, torch.Tensor) and state.dtype == torch.uint8:
        return parse_state(state.numpy().tobytes())
    scales = state.get("scale_fwd") if isinstance(state, Mapping) else None
    if scales is None:
        return None
    if not isinstance(scales, torch.Tensor) or scales.numel() < len(STATE_NAMES):
        raise CheckpointError("its scale_fwd must be a tensor of an input and a weight scale")
    pair = float(scales.flatten()[0]), float(scales.flatten()[1])
    if not all(math.isfinite(scale) and scale > 0 for scale in pair):
        raise CheckpointError(f"FP8 scales must be positive numbers, got {pair}")
    return pair


def make_state(input_scale: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Return the state of a layer with the given scales, as a ``uint8`` tensor of a pickle.

    It names no recipe, as in the states of Transformer Engine 1; version 2 then takes delayed scaling.
    """
    forward = torch.ones(_NUM_FORWARD)
    forward[:2] = torch.stack([input_scale.float(), weight_scale.float()])
    backward = torch.ones(_NUM_BACKWARD)
    state: dict[str, Any] = {
        "scale_fwd": forward,
        "scale_inv_fwd": forward.reciprocal(),
        "amax_history_fwd": torch.zeros(_HISTORY_LENGTH, _NUM_FORWARD),
        "scale_bwd": backward,
        "scale_inv_bwd": backward.reciprocal(),
        "amax_history_bwd": torch.zeros(_HISTORY_LENGTH, _NUM_BACKWARD),
        "extra_fp8_variables": {},
    }
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
