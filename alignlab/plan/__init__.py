"""What a run costs, found without weights, data or a GPU (docs/scale.md).

`plan_run` (`plan.py`) is the whole of it: `fake_run.py` builds the run's own classes of tensors
without values, `fake_step.py` takes its steps, `parts.py` says what each operation belongs to,
`flops.py` counts it and `live_memory.py` what is held. `sizes.py` has the arithmetic of bytes.
"""
