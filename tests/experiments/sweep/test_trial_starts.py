"""A trial's run is started several times: what an earlier start wrote about it stays."""

from pathlib import Path
from typing import NoReturn

import pytest
from optuna.trial import TrialState

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers import local
from alignlab.experiments.sweep import lease as sweep_lease
from alignlab.experiments.sweep import run as sweep_run
from alignlab.experiments.sweep import worker as sweep_worker
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import join_study
from alignlab.runs.atomic_files import write_text
from alignlab.runs.run_folder import RunFolder
from kills import Killed
from small_recipes import sweep_recipe

SWEEP = """
space:
  optim.lr: {kind: categorical, choices: [5.0e-3]}
sampler: {name: random}
metric: val/flow
trials: 1
"""


def test_only_a_start_that_began_to_train_makes_a_failure_the_trials(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def started(run: RunConfig, **_: object) -> NoReturn:
        facts = RunFolder.create(run).path / "environment.json"
        seen.append(facts.read_text() if facts.exists() else "")
        if len(seen) == 2:
            raise UserError("teachers.dino: no such folder")  # before it is built
        write_text(facts, f"start {len(seen)}")
        if len(seen) == 1:
            raise Killed
        raise UserError("a loss is not finite")

    monkeypatch.setattr(local, "train", started)
    monkeypatch.setattr(sweep_run, "write_results", lambda study: Path())
    monkeypatch.setattr(sweep_lease, "GRACE_S", 0.2)
    monkeypatch.setattr(sweep_worker, "LOOK_EVERY_S", 0.05)
    config = load_sweep(
        sweep_recipe(recipe_file, tmp_path / "sweep.yaml", SWEEP), [f"output={tmp_path}"]
    )
    with pytest.raises(Killed):
        sweep(config)
    with pytest.raises(UserError, match="no such folder"):
        sweep(config)
    sweep(config)
    assert seen == ["", "start 1", "start 1"]
    (trial,) = join_study(config).trials()
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["error"] == "a loss is not finite"
