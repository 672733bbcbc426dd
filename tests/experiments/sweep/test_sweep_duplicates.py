"""Trials with the same settings: one trains them, the others take its result."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers import local
from alignlab.experiments.sweep.config import FloatSpace, SweepConfig, load_sweep
from alignlab.experiments.sweep.lease import Lease
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.space import settings_of, suggest_values
from alignlab.experiments.sweep.study import METRICS, SAME_AS, SweepStudy, create_study, join_study
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.trial import TrialRunner
from alignlab.experiments.sweep.worker import work
from alignlab.recipe import load_run
from alignlab.train import train
from run_contents import read_table
from small_recipes import sweep_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeSweep = Callable[..., SweepConfig]

TWO = """
space:
  objectives.ra.weight: {kind: categorical, choices: [0.5, 1.0]}
sampler: {name: random, seed: 0}
metric: val/flow
trials: 6
"""


@pytest.fixture
def make(recipe_file: Path, tmp_path: Path) -> MakeSweep:
    path = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", TWO)
    return lambda *overrides: load_sweep(path, [f"output={tmp_path}", *overrides])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials and seeds that were trained, in order; trainings of weight 0.25 diverge."""
    names: list[str] = []

    def recorded(run: RunConfig, **options: Any) -> Path:
        names.append(run.name.removeprefix("sweep/"))
        folder = train(run, **options)
        if run.objectives["ra"].weight == 0.25:
            raise UserError("diverged")
        return folder

    monkeypatch.setattr(local, "train", recorded)
    return names


def rows_of(config: SweepConfig) -> list[dict[str, str]]:
    return read_table(Path(config.output) / config.name / "trials.csv")


def test_two_choices_train_two_runs(
    make: MakeSweep,
    trained: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make()
    with caplog.at_level(logging.INFO):
        page = sweep(config).read_text()
    rows = rows_of(config)
    assert len(trained) == 2 and len(rows) == 6
    assert {row["state"] for row in rows} == {"complete"}
    first = {row["objectives.ra.weight"]: row for row in reversed(rows)}
    for row in rows:
        own = first[row["objectives.ra.weight"]]
        assert row["val/flow"] == own["val/flow"] and row["folder"] == own["folder"]
        assert row["same_as"] == ("" if row is own else own["trial"])
    again = "4 trials have the settings of an earlier one and took its result"
    assert again in page and again in " ".join(capsys.readouterr().out.split())
    said = [record.getMessage() for record in caplog.records if "is reused" in record.getMessage()]
    assert len(said) == 4
    reused = (
        r"trial \d has the settings of trial \d: its result \(complete\) is reused and counts as"
    )
    assert re.fullmatch(f"{reused} a trial", said[0])


@pytest.fixture
def same(make: MakeSweep) -> SweepConfig:
    """A grid of two points that are the same settings."""
    gate = "space.objectives.ra.gate={kind: categorical, choices: [t^1, {kind: power, p: 1.0}]}"
    config = make("sampler=grid", "trials=null", gate)
    one = FloatSpace(kind="float", low=1, high=1, step=1)
    return config.model_copy(update={"space": {**config.space, "objectives.ra.weight": one}})


def test_params_of_equal_settings_have_one_name(make: MakeSweep) -> None:
    subset = "space.objectives.ra.blocks={kind: blocks, choose: subset, last: 3, max_size: 3}"
    key, config = "objectives.ra.blocks", make(subset)

    def name(*picks: int) -> str | None:
        drawn = {f"{key}.pick{place}": pick for place, pick in enumerate(picks, 1)}
        return settings_of(config, {"objectives.ra.weight": 1.0} | drawn)

    assert name(0, 2, -1) == name(2, 0, -1) == name(2, 0, 2) == name(0, -1, 2)
    assert name(0, 2, -1) not in (name(0, 2, 3), name(0, -1, -1), None)
    assert name(0, 2) is None, "not all drawn yet"


def test_a_grid_of_equal_points_trains_one(same: SweepConfig, trained: list[str]) -> None:
    sweep(same)
    assert trained == ["trial-0000/seed-0"]
    assert [row["same_as"] for row in rows_of(same)] == ["", "0"]


def claimed(study: SweepStudy, count: int) -> list[tuple[optuna.Trial, Lease]]:
    """So many trials, taken and with their params drawn."""
    taken = []
    for _ in range(count):
        one = study.claim()
        assert one is not None
        suggest_values(one[0], study.config.space)
        taken.append(one)
    return taken


def test_the_best_recipe_lies_with_the_trial_that_trained(
    same: SweepConfig, trained: list[str]
) -> None:
    study = create_study(same)
    first, second = claimed(study, 2)
    runner = TrialRunner(study, SweepTracker(study))
    runner.run(*second)
    runner.run(*first)
    sweep(same)
    assert trained == ["trial-0001/seed-0"]
    assert [row["same_as"] for row in rows_of(same)] == ["1", ""]
    best = Path(same.output) / "sweep" / "best.yaml"
    assert best.read_text().startswith("# Trial 0 of the sweep sweep, seed 0: val/flow ")
    assert load_run(best).objectives["ra"].weight == 1.0


def test_workers_that_draw_the_same_train_it_once(same: SweepConfig) -> None:
    """Who has begun trains; a trial whose worker died is left to a lower number."""
    study, other = create_study(same), join_study(same)
    (_, _), (_, lease) = claimed(study, 2)

    def claimed_by(by: SweepStudy, number: int) -> tuple[int, TrialState] | None:
        duplicate = by.claim_settings(number)
        return None if duplicate is None else (duplicate.number, duplicate.state)

    assert claimed_by(study, 1) is None, "it begins"
    assert claimed_by(other, 0) == (1, TrialState.RUNNING), "and is waited for"
    assert study.put_back(1, lease.claim)
    assert claimed_by(other, 0) is None, "the lower number trains in its place"
    assert study.claim() is not None
    assert claimed_by(study, 1) == (0, TrialState.RUNNING)
    assert claimed_by(other, 0) is None, "and goes on"


def test_the_trial_of_a_dead_worker_is_taken_by_the_one_that_waits_for_it(
    same: SweepConfig, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = create_study(same)
    ((_, lease),) = claimed(study, 1)
    assert study.claim_settings(0) is None
    monkeypatch.setattr("time.sleep", lambda _: study.put_back(0, lease.claim))
    work(study, SweepTracker(study))
    assert trained == ["trial-0000/seed-0"]
    assert [t.user_attrs.get(SAME_AS) for t in study.trials()] == [None, 0]


def test_a_failed_trial_is_tried_again(make: MakeSweep, trained: list[str]) -> None:
    config = make("space.objectives.ra.weight.choices=[0.25]", "trials=2")
    sweep(config)
    assert trained == ["trial-0000/seed-0", "trial-0001/seed-0"]
    assert [(row["state"], row["same_as"]) for row in rows_of(config)] == [("fail", "")] * 2


def test_the_seeds_of_a_pruned_trial_are_judged_again(
    make: MakeSweep, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = "space.objectives.ra.weight.choices=[1.0]"
    config = make(choices, "trials=4", "seeds=[0,1]", "steps=1", "pruner=median")
    pruned = iter([True, True, False, False, False, False])
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda _: next(pruned))
    sweep(config)
    assert trained == ["trial-0000/seed-0", "trial-0002/seed-1"]
    rows = [(row["state"], row["same_as"]) for row in rows_of(config)]
    assert rows == [("pruned", ""), ("pruned", "0"), ("complete", "0"), ("complete", "2")]
    lengths = [len(t.user_attrs[METRICS]["val/flow"]) for t in join_study(config).trials()]
    assert lengths == [1, 1, 2, 2]
    assert {row["folder"] for row in rows_of(config)} == {"trial-0000"}


def test_a_metric_that_a_run_could_not_measure_fails_the_trial(
    make: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmeasured(run: RunConfig, **options: Any) -> Path:
        result = train(run, **options) / "result.json"
        content = json.loads(result.read_text())
        del content["metrics"]["cross_cos/mean"], content["checksum"]
        result.write_text(json.dumps(content))
        return result.parent

    monkeypatch.setattr(local, "train", unmeasured)
    config = make("trials=1", "metric=cross_cos/mean")
    sweep(config)
    (row,) = rows_of(config)
    assert (row["state"], row["error"]) == ("fail", "cross_cos/mean was not measured, seed 0")
