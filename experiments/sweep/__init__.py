"""Sweeps: search space, study, workers, results."""
