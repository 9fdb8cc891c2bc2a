"""Scoring, embedding, generation, variant effects and contacts: plain Python over a model, without Ray."""
