"""Weighted cross-entropy as two sums."""

from cistron_kernels.cross_entropy.reference import cross_entropy

__all__ = ["cross_entropy"]
