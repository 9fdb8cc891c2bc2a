"""How good a model is, beside baselines that anybody can compute; no Ray here."""
