"""Attention over packed documents."""

from cistron_kernels.varlen_attention.reference import varlen_attention

__all__ = ["varlen_attention"]
