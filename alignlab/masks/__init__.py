"""Entity masks of real clips, made by segmenters from prompts in the first frame or from texts."""
