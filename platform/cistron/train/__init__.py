"""Training on Ray: one loop per worker, any parallel strategy, checkpoints that continue where they stopped."""
