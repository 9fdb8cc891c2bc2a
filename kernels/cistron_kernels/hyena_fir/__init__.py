"""Causal finite filters of the Hyena operators."""

from cistron_kernels.hyena_fir.reference import TapOrder, hyena_fir

__all__ = ["TapOrder", "hyena_fir"]
