"""Comparisons, sweeps and reports; the room that runs the harness many times."""
