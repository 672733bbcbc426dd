"""Benchmarks: kernels, share of the loss in a step, overhead of the harness."""
