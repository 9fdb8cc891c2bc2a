"""Peak memory of ESM-2's contacts (150M shape, T = 1024) above the weights, beside that of all attention maps."""

from __future__ import annotations

import time
from typing import Any, Final, cast

import torch

from benchmarks.memory import peak, resident
from benchmarks.timing import in_new_process
from cistron.models.esm2.blocks import Block
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2

SHAPE: Final = Esm2Config(hidden_size=640, num_hidden_layers=30, num_attention_heads=20)
TOKENS: Final = 1024
CHECKED: Final = 96
"""Tokens of the protein on which both ways are compared: small, so that it does not set the peak."""
TOLERANCE: Final = 1e-5
MOST_ALIKE: Final = 1e-2
LARGEST_SHARE: Final = 0.25
_MIB: Final = 2**20


def run() -> list[dict[str, Any]]:
    """Return the measurement of a fresh process; too much memory, or contacts that differ, are an error."""
    row: dict[str, Any] = in_new_process(measure)
    if row["share"] >= LARGEST_SHARE:
        raise AssertionError(f"contacts took {row['share']} of the full maps' memory, asked is < {LARGEST_SHARE}")
    return [row]


@torch.inference_mode()
def measure() -> dict[str, Any]:
    """Predict contacts of one protein in this process and return what it took."""
    torch.set_num_threads(2)
    model = _model()
    difference = _difference(model, _protein(CHECKED))
    if difference > TOLERANCE:
        raise AssertionError(f"contacts differ from those of the full maps by {difference:.1e}")
    ids = _protein(TOKENS)
    before = resident()
    start = time.perf_counter()
    model.predict_contacts(ids)
    seconds = time.perf_counter() - start
    growth = peak() - before
    maps = SHAPE.num_layers * SHAPE.num_attention_heads * TOKENS**2 * 4
    return {
        "tokens": TOKENS,
        "growth_mib": round(growth / _MIB),
        "full_maps_mib": round(maps / _MIB),
        "share": round(growth / maps, 3),
        "asked": f"< {LARGEST_SHARE}",
        "largest_difference": float(f"{difference:.1e}"),
        "asked_difference": TOLERANCE,
        "seconds": round(seconds, 1),
    }


def _model() -> Esm2:
    """Build the model with weights that attend unevenly, or all contacts would be alike."""
    model = Esm2(SHAPE).eval()
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("query.weight", "key.weight")):
            parameter.normal_(std=2 * SHAPE.hidden_size**-0.5, generator=generator)
    regression = model.esm.contact_head.regression
    regression.weight.normal_(generator=generator)
    return model


def _protein(tokens: int) -> torch.Tensor:
    ids = torch.randint(4, 24, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    ids[0, 0], ids[0, -1] = 0, 2
    return ids


def _difference(model: Esm2, ids: torch.Tensor) -> float:
    """Compare with the plain computation, which keeps all maps; their weights and representations are the same."""
    layout = model._layout(ids, None, None)
    x = model.esm.embeddings(ids, layout)
    maps = []
    for layer in model.blocks:
        block = cast("Block", layer)
        q, k = (part.transpose(1, 2) for part in block.query_key(x, layout))
        maps.append((q @ k.mT * block.attention.self.scale).softmax(dim=-1)[..., 1:-1, 1:-1])
        x = block(x, layout)
    pairs = torch.cat(maps, dim=1)
    pairs = pairs + pairs.mT
    rows, columns = pairs.sum(dim=-1, keepdim=True), pairs.sum(dim=-2, keepdim=True)
    corrected = pairs - rows * columns / rows.sum(dim=-2, keepdim=True)
    head = model.esm.contact_head.regression
    want = torch.sigmoid(torch.einsum("a,baij->bij", head.weight[0], corrected) + head.bias)
    if want.std() < MOST_ALIKE:
        raise AssertionError("the contacts are all alike: comparing them proves nothing")
    return float((model.predict_contacts(ids) - want).abs().max())
