"""A trial whose values leave an objective nothing to align fails, and the sweep goes on."""

from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.trial import trial_run
from small_recipes import sweep_recipe

SWEEP = """
metric: val/flow
trials: 2
space:
  flow.both_dropout: {kind: float, low: 0.0, high: 0.8}
"""


def test_values_that_drop_every_reference(recipe_file: Path, tmp_path: Path) -> None:
    path = sweep_recipe(recipe_file, tmp_path / "drops.yaml", SWEEP)
    config = load_sweep(path, [f"output={tmp_path}"])
    with pytest.raises(UserError, match=r"reference_dropout \+ both_dropout is 1"):
        trial_run(
            config,
            {"flow.both_dropout": 0.8, "flow.reference_dropout": 0.2, "flow.text_dropout": 0.0},
            0,
            0,
        )
    assert trial_run(config, {"flow.both_dropout": 0.5}, 0, 0).flow.both_dropout == 0.5
