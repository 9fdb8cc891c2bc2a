"""Pieces that both model families are built from."""
