"""ESM-2: a bidirectional protein language model."""
