"""One name per representation, whatever dialect it was asked for in.

Ours: ``embedding``, ``blocks.0`` .. ``blocks.{n-1}`` (a block's output in the residual stream), ``final_norm``. vortex
says ``embedding_layer`` and ``norm``; NeMo says ``decoder.layers.3`` and ``decoder.final_norm``. An integer indexes the
blocks, and -1 is the representation after the final norm.
"""

from __future__ import annotations

import re
from typing import Final

from cistron.errors import UnknownNameError, nearest

EMBEDDING: Final = "embedding"
FINAL_NORM: Final = "final_norm"

_ALIASES: Final = {"embedding_layer": EMBEDDING, "norm": FINAL_NORM, "decoder.final_norm": FINAL_NORM}
_BLOCK: Final = re.compile(r"(?:decoder\.layers|blocks)\.(\d+)")


def block_name(index: int) -> str:
    """Return the canonical name of block `index`."""
    return f"blocks.{index}"


def layer_names(num_layers: int) -> list[str]:
    """Return every canonical name, in the order of the forward pass."""
    return [EMBEDDING, *(block_name(i) for i in range(num_layers)), FINAL_NORM]


def canonical_layer(layer: str | int, *, num_layers: int) -> str:
    """Return the canonical name of `layer`.

    >>> canonical_layer(-1, num_layers=4), canonical_layer("decoder.layers.2", num_layers=4)
    ('final_norm', 'blocks.2')

    Raises:
        UnknownNameError: no such representation; the message lists what exists.
    """
    name = _from_index(layer, num_layers) if isinstance(layer, int) else layer
    match = _BLOCK.fullmatch(name)
    name = block_name(int(match.group(1))) if match else _ALIASES.get(name, name)
    known = layer_names(num_layers)
    if name not in known:
        raise UnknownNameError(
            f"unknown layer {layer!r}{nearest(str(layer), known)} (known: {EMBEDDING}, blocks.0 .. "
            f"blocks.{num_layers - 1}, {FINAL_NORM}; integers index blocks, -1 is {FINAL_NORM})"
        )
    return name


def _from_index(index: int, num_layers: int) -> str:
    if index == -1:
        return FINAL_NORM
    return block_name(index if index >= 0 else num_layers + 1 + index)
