"""Every variant of a comparison tuned by a sweep of its own, and the best of each compared."""
