"""The Wan transformer: loading, LoRA, attention backends, reference branch, taps."""
