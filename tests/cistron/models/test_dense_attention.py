from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from cistron.models.layers import dense_attention as module
from cistron.models.layers.dense_attention import dense_attention, prefers_cudnn


def _on_gpu(**changes: Any) -> torch.Tensor:
    """Stand for queries on a GPU: what is asked of them, and nothing else."""
    parts = {"is_cuda": True, "dtype": torch.bfloat16, "shape": torch.Size([1, 2, 64, 128]), "device": "cuda"}
    return cast(torch.Tensor, SimpleNamespace(**{**parts, **changes}))


@pytest.mark.parametrize(
    ("capability", "changes", "wanted"),
    [
        ((9, 0), {}, True),
        ((8, 0), {}, False),
        ((10, 0), {}, False),
        ((9, 0), {"dtype": torch.float32}, False),
        ((9, 0), {"shape": torch.Size([1, 2, 1, 128])}, False),
        ((9, 0), {"is_cuda": False}, False),
    ],
)
def test_cudnn_is_preferred_on_hopper_only(
    capability: tuple[int, int], changes: dict[str, Any], wanted: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert prefers_cudnn(_on_gpu(**changes)) is wanted


def test_the_order_of_kernels_changes_no_number(monkeypatch: pytest.MonkeyPatch):
    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind()
    want = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    seen: list[list[SDPBackend]] = []
    real = module.sdpa_kernel

    def watched(backends: list[SDPBackend], *, set_priority: bool) -> Any:
        assert set_priority
        seen.append(backends)
        return real(backends, set_priority=set_priority)

    monkeypatch.setattr(module, "sdpa_kernel", watched)
    assert torch.equal(dense_attention(q, k, v, is_causal=True, scale=0.3), want)
    assert not seen
    monkeypatch.setattr(module, "prefers_cudnn", lambda q: True)
    torch.testing.assert_close(dense_attention(q, k, v, is_causal=True, scale=0.3), want)
    assert seen[0][0] is SDPBackend.CUDNN_ATTENTION
    assert SDPBackend.MATH in seen[0]
