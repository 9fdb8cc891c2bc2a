from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import CapabilityError
from cistron.inference.embed import embed_sequences
from cistron.inference.score import score_sequences
from cistron.inference.variants import score_variants
from cistron.models.base import SequenceModel


def damaged(model: SequenceModel) -> SequenceModel:
    """A model whose last weights overflowed."""
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "norm" in name).fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    ("make", "door"),
    [
        (tiny_evo2, lambda model: score_sequences(model, ["ACGT", "A"])),
        (tiny_evo2, lambda model: embed_sequences(model, ["ACGT"])),
        (tiny_evo2, lambda model: score_variants(model, [("c", 2, "C", "G")], {"c": "ACGT"}, window=4)),
        (tiny_esm2, lambda model: score_sequences(model, ["MKT"])),
        (tiny_esm2, lambda model: embed_sequences(model, ["MKT"])),
        (tiny_esm2, lambda model: score_variants(model, ["K2A"], "MKT")),
        (tiny_esm2, lambda model: score_variants(model, ["K2A"], "MKT", strategy="wt-marginal")),
        (tiny_esm2, lambda model: score_variants(model, ["K2A"], "MKT", strategy="pseudo-ppl")),
    ],
)
def test_nan_is_an_error_and_no_result(make: Callable[[], SequenceModel], door: Callable[[SequenceModel], Any]):
    door(make())
    with pytest.raises(CapabilityError, match=r"the model returned NaN: .* try precision=fp32"):
        door(damaged(make()))
