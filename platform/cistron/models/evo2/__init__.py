"""Evo 2: a causal DNA language model of Hyena convolutions and attention (StripedHyena 2)."""
