"""What a training costs, found without weights, data or a GPU (docs/scale.md).

`plan_run` (`run_plan.py`) is the whole of it for a run: `fake_run.py` builds the run's own classes
of tensors without values, `fake_step.py` takes its steps, `parts.py` says what each operation
belongs to, `flops.py` counts it and `live_memory.py` what is held. `sizes.py` has the arithmetic of
bytes. Of a Stage 1 training `plan_stage1` (`stage1_plan.py`) and `fake_stage1.py` do the same.
"""
