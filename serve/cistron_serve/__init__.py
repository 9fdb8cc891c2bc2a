"""Evo 2 and ESM-2 over HTTP, on Ray Serve."""
