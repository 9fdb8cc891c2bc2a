"""Rotary position embedding."""

from cistron_kernels.rope.reference import rope, rotate, rotation

__all__ = ["rope", "rotate", "rotation"]
