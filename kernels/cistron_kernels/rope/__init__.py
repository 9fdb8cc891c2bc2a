"""Rotary position embedding."""

from cistron_kernels.rope.reference import rope

__all__ = ["rope"]
