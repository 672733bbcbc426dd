"""Pruners act inside the run of a trial's first seed where it is evaluated while it trains."""

from pathlib import Path

import pytest
from optuna.trial import TrialState

from alignlab.errors import UserError
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.pruning import PrunedRunError
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import create_study, join_study
from alignlab.experiments.sweep.tracking import STATUS
from alignlab.runs.checkpoint_folders import step_folders
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking.tracker import status_of
from run_contents import read_table
from small_recipes import sweep_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

SWEEP = """
space:
  optim.lr: {kind: categorical, choices: [5.0e-3, 1.0e-5]}
sampler: {name: random, seed: 1}
pruner: {name: median, startup: 1}
metric: val/flow
trials: 3
"""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep_recipe(recipe_file, tmp_path_factory.mktemp("pruned") / "sweep.yaml", SWEEP)


def test_a_hopeless_trial_ends_inside_its_run(recipe: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", "optim.lr=5e-3", "steps=3", "eval.every=1"]
    overrides += ["checkpoint.every=1", "checkpoint.keep_finished=none"]
    config = load_sweep(recipe, overrides)
    page = sweep(config).read_text()
    rows = read_table(tmp_path / "sweep" / "trials.csv")
    by_lr = {row["optim.lr"]: row for row in rows}
    good, bad = by_lr["0.005"], by_lr["1e-05"]
    assert (good["state"], good["pruned_at"]) == ("complete", "")
    assert bad["state"] == "pruned" and bad["pruned_at"] in ("1", "2")
    folder = RunFolder(tmp_path / "sweep" / bad["folder"] / "seed-0")
    assert folder.metrics.exists() and not folder.result.exists()
    assert not step_folders(folder.checkpoints)
    assert f"{bad['trial']} at step {bad['pruned_at']}" in page
    trials = join_study(config).trials()
    assert list(trials[0].intermediate_values) == [1, 2, 3]
    pruned = trials[int(bad["trial"])]
    assert list(pruned.intermediate_values)[-1] == int(bad["pruned_at"])
    assert pruned.state == TrialState.PRUNED
    # without its study the same trials are drawn, and judged by the runs that are there
    (tmp_path / "sweep" / "study.db").unlink()
    sweep(config)
    again = read_table(tmp_path / "sweep" / "trials.csv")
    outcomes = [[(row["state"], row["pruned_at"]) for row in table] for table in (rows, again)]
    assert outcomes[0] == outcomes[1]


def test_a_run_that_was_pruned_is_killed_in_mlflow_as_its_trial_is() -> None:
    assert status_of(PrunedRunError()) == STATUS["PRUNED"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["steps=4"], "with a smaller eval.every, val/flow is measured inside a run as well"),
        (["steps=4", "eval.every=4"], "needs at least 2 of them, the recipe has 1"),
        (["steps=4", "eval.every=1", "metric=time/step"], "time/step is measured at the end"),
        (["steps=4", "eval.every=1", "pruner=wilcoxon"], "it pairs trials by seed"),
        (
            ["steps=4", "eval.every=2", "pruner=hyperband"],
            "needs at least 3 of them, a trial has 2",
        ),
        (
            ["steps=4", "eval.every=1", "space.steps={kind: int, low: 2, high: 4}"],
            "runs of different steps cannot be compared",
        ),
    ],
)
def test_a_pruner_that_reads_nothing_is_refused(
    overrides: list[str], expected: str, recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        load_sweep(recipe, [f"output={tmp_path}", *overrides])


def test_steps_count_over_seeds(recipe: Path, tmp_path: Path) -> None:
    shared = [f"output={tmp_path}", "steps=4", "eval.every=2", "seeds=[0,1]"]
    study = create_study(load_sweep(recipe, [*shared, "pruner=hyperband"])).study
    assert vars(study.pruner)["_min_resource"] == 2
    assert vars(study.pruner)["_max_resource"] == 8
