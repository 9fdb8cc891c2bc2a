"""Measurements beside peers: ratios taken in one run, because absolute times of shared machines mean little."""
