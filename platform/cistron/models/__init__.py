"""Evo 2 and ESM-2, their registry, and the checkpoint format that both share."""
