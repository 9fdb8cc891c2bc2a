from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError
from cistron.models.layers.inputs import check_rows


@pytest.mark.parametrize(("bad", "named"), [(33, "33"), (-1, "-1"), (10**6, "1000000")])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_id_outside_the_vocabulary_is_named(bad: int, named: str, dtype: torch.dtype):
    model, ids = tiny_esm2(), torch.tensor([0, 5, bad, 2], dtype=dtype)
    message = f"input_ids: {named} is outside the vocabulary, ids 0 to 32"
    with pytest.raises(InputError, match=message):
        model(ids[None])
    with pytest.raises(InputError, match=message):
        model(ids, cu_seqlens=torch.tensor([0, 2, 4]))
    with pytest.raises(InputError, match=message):
        cast(Any, model).predict_contacts(ids[None])


@pytest.mark.parametrize("bad", [512, -1])
def test_an_id_that_is_no_byte_is_named(bad: int):
    model, ids = tiny_evo2(), torch.tensor([65, 67, bad, 71])
    message = f"input_ids: {bad} is outside the vocabulary, ids 0 to 511"
    with pytest.raises(InputError, match=message):
        model(ids[None])
    with pytest.raises(InputError, match=message):
        model(ids, cu_seqlens=torch.tensor([0, 2, 4]))
    cache = model.new_cache(1)
    with pytest.raises(InputError, match=message):
        model(ids[None], cache=cache)
    assert cache.lengths.tolist() == [0]


def test_every_id_of_the_vocabulary_is_read():
    assert tiny_esm2()(torch.arange(33)[None]).logits.shape == (1, 33, 33)
    assert tiny_evo2()(torch.arange(512)[None]).logits.shape == (1, 512, 512)


def test_ids_on_a_gpu_are_not_looked_at():
    """A tensor that answers nothing about its values stands for one whose values are behind a queue of kernels."""
    ids = SimpleNamespace(
        dtype=torch.int64, device=torch.device("cuda"), shape=torch.Size([1, 3]), dim=lambda: 2, numel=lambda: 3
    )
    check_rows(cast(torch.Tensor, ids), None, vocab_size=33)
