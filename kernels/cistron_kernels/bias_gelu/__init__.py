"""Bias followed by the exact GELU."""

from cistron_kernels.bias_gelu.reference import bias_gelu

__all__ = ["bias_gelu"]
