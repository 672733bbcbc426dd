"""Comparisons: recipe, fairness, budget, cost, runs, result."""
