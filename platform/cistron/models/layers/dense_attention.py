"""Softmax attention between rows of one length, by torch's own kernels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

_HOPPER: Final = (9, 0)
_ORDER_ON_HOPPER: Final = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attend from q [B, A, L, D] to k and v [B, A, M, D]; `options` are those of ``scaled_dot_product_attention``.

    On Hopper, cuDNN's kernel is asked first: torch's flash attention is the one written for Ampere. cuDNN declines what
    it cannot do, and the next one is asked.
    """
    if prefers_cudnn(q):
        with sdpa_kernel(_ORDER_ON_HOPPER, set_priority=True):
            return functional.scaled_dot_product_attention(q, k, v, **options)
    return functional.scaled_dot_product_attention(q, k, v, **options)


def prefers_cudnn(q: torch.Tensor) -> bool:
    """Return whether several tokens of each row attend, in half precision, on Hopper.

    For one token, arranging the order would cost more than the kernel.
    """
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-2] > 1
        and torch.cuda.get_device_capability(q.device) == _HOPPER
    )
