"""Gated linear unit."""

from cistron_kernels.glu.reference import Activation, glu

__all__ = ["Activation", "glu"]
