"""Results of comparisons, sweeps and runs as data: pandas frames, sentences, a plot."""
