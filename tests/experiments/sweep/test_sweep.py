"""Small real sweeps in this process: results, pruning, failures, Pareto fronts, MLflow."""

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from alignlab.config.run import RunConfig
from alignlab.config.written_names import refuse_written
from alignlab.errors import UserError
from alignlab.experiments.launchers import local
from alignlab.experiments.send import send_folder
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.results import best_trial, ranked
from alignlab.experiments.sweep.run import join, sweep
from alignlab.experiments.sweep.study import join_study
from alignlab.recipe import load_run
from alignlab.runs.metric_rows import read_rows
from alignlab.tracking.mlflow_run import read_state
from alignlab.train import Trainer, train
from alignlab.training.batches import Batch
from alignlab.training.step_terms import StepScalars
from run_contents import read_table, timeless, timeless_metrics
from small_recipes import sweep_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeSweep = Callable[..., SweepConfig]

SWEEP = """
checkpoint: {every: 1}
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
  objectives.ra.blocks: {kind: blocks, choose: subset, last: 3, max_size: 2}
metric: val/flow
trials: 3
"""


@pytest.fixture(scope="module", autouse=True)
def few_charts() -> None:
    """Here a page has all its charts."""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep_recipe(recipe_file, tmp_path_factory.mktemp("sweep") / "sweep.yaml", SWEEP)


@pytest.fixture
def make(recipe: Path, tmp_path: Path) -> MakeSweep:
    return lambda *overrides: load_sweep(recipe, [f"output={tmp_path}", *overrides])


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    """A finished sweep of three trials; its folder is not to be changed."""
    config = load_sweep(recipe, [f"output={tmp_path_factory.mktemp('sweeps')}"])
    sweep(config)
    return config


def folder_of(config: SweepConfig) -> Path:
    return Path(config.output) / config.name


def rows_of(config: SweepConfig) -> list[dict[str, str]]:
    return read_table(folder_of(config) / "trials.csv")


def metric_of(run: Path, name: str = "val/flow") -> float:
    return float(json.loads((run / "result.json").read_text())["metrics"][name])


def test_no_run_may_have_the_name_of_what_a_sweep_writes(finished: SweepConfig) -> None:
    for path in folder_of(finished).iterdir():
        if not path.name.startswith("trial-"):
            with pytest.raises(ValueError, match="alignlab"):
                refuse_written(path.name)


def test_the_best_recipe_reproduces_its_own_metric(finished: SweepConfig, tmp_path: Path) -> None:
    path = folder_of(finished) / "best.yaml"
    rows = rows_of(finished)
    values = [float(row["val/flow"]) for row in rows]
    assert len(set(values)) == 3, "the trials differ"
    run = train(load_run(path, [f"output={tmp_path}"]))
    assert metric_of(run) == min(values)
    assert f"val/flow {min(values)!r}" in path.read_text().split("\n")[0]
    best = folder_of(finished) / rows[values.index(min(values))]["folder"] / "seed-0"
    for name, value in timeless_metrics(run).items():
        assert metric_of(best, name) == value, name


def test_the_recipes_own_settings_come_first_and_all_are_measured_alike(
    finished: SweepConfig,
) -> None:
    first, *others = rows_of(finished)
    assert first["objectives.ra.weight"] == "1.0" and first["objectives.ra.blocks"] == "[0, 2]"
    assert all(row["teacher_retrieval/block3"] for row in (first, *others))
    run = load_run(folder_of(finished) / "trial-0001" / "seed-0" / "recipe.yaml")
    assert f"{run.objectives['ra'].weight}" == others[0]["objectives.ra.weight"]


def test_the_page_stands_alone(finished: SweepConfig) -> None:
    text = (folder_of(finished) / "sweep.html").read_text()
    for title in ("history", "importance", "slice", "parallel", "pairs", "objectives.ra.blocks"):
        assert f"<b>val/flow: {title}</b>" in text
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "the best of 3 finished ones" in text


def no_training(*_: object, **__: object) -> Path:
    raise AssertionError("trained again")


def test_a_finished_sweep_is_not_trained_again(
    finished: SweepConfig,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(local, "train", no_training)
    before = (folder_of(finished) / "trials.csv").read_text()
    with caplog.at_level(logging.INFO, "alignlab"):
        sweep(finished)
    assert "all 3 trials are finished already" in caplog.text
    assert (folder_of(finished) / "trials.csv").read_text() == before
    output = f"output={finished.output}"
    other = r"another recipe \(space\.objectives\.ra\.weight\.high was 10\.0, is 5\.0\): choose"
    with pytest.raises(UserError, match=other):
        sweep(load_sweep(recipe, [output, "space.objectives.ra.weight.high=5"]))
    more = r"\(metric was .*'val/flow'.*, is .*'cross_cos/mean'.*; optim\.lr was 0\.001, is"
    with pytest.raises(UserError, match=more):
        sweep(load_sweep(recipe, [output, "metric=cross_cos/mean", "optim.lr=2e-3"]))
    with pytest.raises(UserError, match="cannot shrink to 2: give trials=3 or more"):
        sweep(load_sweep(recipe, [output, "trials=2"]))


def test_joining_needs_a_study(make: MakeSweep) -> None:
    with pytest.raises(UserError, match=r"no study 'sweep' in .*start the sweep without --join"):
        join(make())


def test_a_killed_sweep_resumes_as_if_nothing_had_happened(
    make: MakeSweep, finished: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second trial, after its first checkpoint."""
    steps = 0

    take_step = Trainer.step

    def interrupted(trainer: Trainer, batches: list[Batch]) -> StepScalars:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return take_step(trainer, batches)

    config = make()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)
    left = join_study(config)
    states = [trial.state for trial in left.trials()]
    assert states == [TrialState.COMPLETE, TrialState.WAITING, TrialState.WAITING]
    assert left.trials()[1].params, "the trial keeps what it drew"
    sweep(config)
    again, once = ([timeless(row) for row in rows_of(one)] for one in (config, finished))
    assert again == once
    rows = read_rows(folder_of(config) / "trial-0001" / "seed-0" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]


def test_more_trials_may_be_added(make: MakeSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(make("trials=1"))
    config = make("trials=2")
    trained: list[object] = []

    def counted(*args: object, **kwargs: object) -> Path:
        trained.append(args)
        return train(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "train", counted)
    sweep(config)
    assert len(trained) == 1 and [row["state"] for row in rows_of(config)] == ["complete"] * 2


def test_a_diverged_trial_is_failed_and_counted(
    make: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(run: RunConfig, **options: Any) -> Path:
        folder = train(run, **options)
        if run.optim.lr == 1.0:
            raise UserError("loss/total is not finite after step 2")
        return folder

    monkeypatch.setattr(local, "train", diverging)
    lr = "space.optim.lr={kind: categorical, choices: [0.001, 1.0]}"
    config = make(lr, "trials=2", "sampler={name: random, seed: 0}")
    sweep(config)
    by_lr = {row["optim.lr"]: row for row in rows_of(config)}
    bad = by_lr["1.0"]
    assert bad["state"] == "fail" and "is not finite" in bad["error"]
    assert by_lr["0.001"]["state"] == "complete"


def test_a_trial_that_diverged_to_finite_numbers_cannot_win(make: MakeSweep) -> None:
    config = make("optim.lr=1", "trials=1")
    sweep(config)
    (row,) = rows_of(config)
    assert (row["state"], row["error"]) == ("fail", "diverged, seed 0")
    assert math.isfinite(float(row["val/flow"]))
    assert not (folder_of(config) / "best.yaml").exists()


def test_a_recipe_that_cannot_run_stops_the_sweep(make: MakeSweep) -> None:
    config = make("teachers.dino.path=assets/nothing-here")
    with pytest.raises(UserError, match="nothing-here"):
        sweep(config)
    assert {t.state for t in join_study(config).trials()} == {TrialState.WAITING}


def test_an_unknown_metric_is_named(make: MakeSweep) -> None:
    with pytest.raises(UserError, match="unknown metric 'retrieval/meen', did you mean"):
        sweep(make("metric={name: retrieval/meen, direction: maximize}"))


def test_constraints_and_several_metrics(make: MakeSweep) -> None:
    config = make("metric=[val/flow,time/step]", "sampler=nsga2")
    sweep(config)
    study = join_study(config)
    page = (folder_of(config) / "sweep.html").read_text()
    assert "<b>Pareto front</b>" in page and "<b>time/step: history</b>" in page
    assert all(len(trial.values) == 2 for trial in study.trials())
    flows = sorted(float(row["val/flow"]) for row in rows_of(config))
    bound = (flows[0] + flows[1]) / 2
    tight = make("name=tight", f"constraints={{val/flow: {bound}}}")
    sweep(tight)
    feasible = [row["feasible"] for row in rows_of(tight)]
    assert feasible.count("True") == len(ranked(join_study(tight))) < 3
    impossible = make("name=none", "constraints={memory/peak_mib: 1}", "trials=1")
    sweep(impossible)
    assert best_trial(join_study(impossible)) is None
    assert not (folder_of(impossible) / "best.yaml").exists()


def test_a_hopeless_trial_is_pruned_between_its_seeds(make: MakeSweep) -> None:
    lr = "space.optim.lr={kind: categorical, choices: [5e-3, 1e-5]}"
    seeds = ["optim.lr=5e-3", "trials=3", "seeds=[0,1]", "steps=1"]
    searched = ["pruner={name: median, startup: 1}", "sampler={name: random, seed: 1}"]
    config = make(lr, *seeds, *searched)
    sweep(config)
    by_lr = [(row["optim.lr"], row["state"], row["folder"]) for row in rows_of(config)]
    assert {"complete", "pruned"} == {state for _, state, _ in by_lr}, by_lr
    for rate, state, name in by_lr:
        assert (state == "pruned") == (rate == "1e-05")
        assert (folder_of(config) / name / "seed-1").exists() == (state == "complete")


@pytest.mark.parametrize("place", ["sqlite", "http://127.0.0.1:9"])
def test_mlflow_runs_are_nested_and_linked(
    place: str,
    make: MakeSweep,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr("alignlab.tracking.connection._connections", {})  # of earlier commands

    config = make(f"tracking.mlflow={place}", "trials=1", "steps=1")
    sweep(config)
    if place != "sqlite":  # nothing listens there: it is sent later
        assert caplog.text.count("connection refused: nothing is lost") == 1
        assert caplog.text.count(f"`alignlab track {folder_of(config)}`") == 1
        assert send_folder(folder_of(config), to="sqlite").complete
    client = MlflowClient(f"sqlite:///{config.output}/mlflow.db")
    study = join_study(config).study
    parent = client.get_run(study.user_attrs["mlflow_run_id"])
    (trial,) = study.trials
    nested = client.get_run(read_state(folder_of(config) / "trial-0000")["run_id"])
    assert place != "sqlite" or trial.user_attrs["mlflow_run_id"] == nested.info.run_id
    trained = read_state(folder_of(config) / "trial-0000" / "seed-0")["run_id"]
    assert parent.data.tags["optuna.study"] == "sweep" and parent.info.status == "FINISHED"
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert nested.data.tags["optuna.trial"] == "0"
    assert nested.data.metrics["val/flow"] == trial.value
    assert nested.data.params["objectives.ra.weight"] == "1.0"
    assert client.get_run(trained).data.tags["mlflow.parentRunId"] == nested.info.run_id
    experiments = {run.info.experiment_id for run in (parent, nested, client.get_run(trained))}
    assert len(experiments) == 1
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"recipe.yaml", "best.yaml", "trials.csv", "sweep.html"}
    runs = client.search_runs(list(experiments))
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
