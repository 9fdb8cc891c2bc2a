"""One name per representation, whatever dialect it was asked for in.

Ours, in the order of the forward pass:

- ``embedding``
- ``blocks.0`` .. ``blocks.{n-1}``: a block's output in the residual stream; inside it, ``blocks.3.mixer`` and
  ``blocks.3.mlp``: what its convolution or attention and its MLP add to that stream
- ``final_norm``
- ``logits``

vortex says ``embedding_layer``, ``blocks.3.mlp.l3``, ``norm`` and ``unembed``; NeMo says ``decoder.layers.3``,
``decoder.layers.3.mlp.linear_fc2``, ``decoder.final_norm`` and ``output_layer``. An integer indexes the blocks, and -1
is the representation after the final norm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from cistron.errors import UnknownNameError, nearest

EMBEDDING: Final = "embedding"
FINAL_NORM: Final = "final_norm"
LOGITS: Final = "logits"
MIXER: Final = "mixer"
MLP: Final = "mlp"

_ALIASES: Final = {
    "embedding_layer": EMBEDDING,
    "norm": FINAL_NORM,
    "decoder.final_norm": FINAL_NORM,
    "unembed": LOGITS,
    "output_layer": LOGITS,
}
_BLOCK: Final = re.compile(r"(decoder\.layers|blocks)\.(\d+)(?:\.(.+))?")
_PARTS: Final = {"blocks": {"mlp.l3": MLP}, "decoder.layers": {"mlp.linear_fc2": MLP}}
_INNER: Final = re.compile(r"blocks\.(\d+)\.(.+)")


def block_name(index: int) -> str:
    """Return the canonical name of block `index`."""
    return f"blocks.{index}"


def inner_name(index: int, part: str) -> str:
    """Return the canonical name of what one part of block `index` adds to the residual stream."""
    return f"{block_name(index)}.{part}"


def parsed_inner_name(name: str) -> tuple[int, str] | None:
    """Return the block and the part that a canonical name means, or None if it means something else.

    >>> parsed_inner_name("blocks.12.mlp"), parsed_inner_name("blocks.12")
    ((12, 'mlp'), None)
    """
    match = _INNER.fullmatch(name)
    return (int(match.group(1)), match.group(2)) if match else None


def layer_names(num_layers: int) -> list[str]:
    """Return every canonical name, in the order of the forward pass."""
    blocks = (name for i in range(num_layers) for name in (inner_name(i, MIXER), inner_name(i, MLP), block_name(i)))
    return [EMBEDDING, *blocks, FINAL_NORM, LOGITS]


def canonical_layer(layer: str | int, *, num_layers: int) -> str:
    """Return the canonical name of `layer`.

    >>> canonical_layer(-1, num_layers=4), canonical_layer("decoder.layers.2", num_layers=4)
    ('final_norm', 'blocks.2')
    >>> canonical_layer("blocks.3.mlp.l3", num_layers=4)
    'blocks.3.mlp'

    Raises:
        UnknownNameError: no such representation; the message lists what exists.
    """
    name = _from_index(layer, num_layers) if isinstance(layer, int) else _translated(layer)
    known = layer_names(num_layers)
    if name not in known:
        last = block_name(num_layers - 1)
        raise UnknownNameError(
            f"unknown layer {layer!r}{nearest(str(layer), known)} (known: {EMBEDDING}, {block_name(0)} .. {last}, each "
            f"also with .{MIXER} or .{MLP}, {FINAL_NORM}, {LOGITS}; integers index blocks, -1 is {FINAL_NORM})"
        )
    return name


def by_names_asked(
    found: Mapping[str, torch.Tensor], asked: Sequence[str | int], *, num_layers: int
) -> dict[str, torch.Tensor]:
    """Return the representations by canonical name, and by the names that they were asked for where these differ."""
    spelled = {layer: found[canonical_layer(layer, num_layers=num_layers)] for layer in asked if isinstance(layer, str)}
    return {**found, **spelled}


def _from_index(index: int, num_layers: int) -> str:
    if index == -1:
        return FINAL_NORM
    return block_name(index if index >= 0 else num_layers + 1 + index)


def _translated(name: str) -> str:
    """Return a name of vortex or NeMo in our spelling, and any other as it is."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _ALIASES.get(name, name)
    dialect, index, part = match.groups()
    if part is None:
        return block_name(int(index))
    return inner_name(int(index), _PARTS[dialect].get(part, part))
