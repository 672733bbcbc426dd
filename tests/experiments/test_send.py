"""What MLflow lacks of a folder that holds several things, some of which are damaged."""

import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from alignlab.experiments.compare.tracking import VARIANT
from alignlab.experiments.send import send_folder
from alignlab.recipe import load_run
from alignlab.runs.run_folder import RunFolder, only_writer
from alignlab.tracking import Tracker
from alignlab.tracking.mlflow_run import only_sender, write_tags
from small_recipes import sweep_recipe

SWEEP = """
space:
  optim.lr: {kind: categorical, choices: [5.0e-3, 1.0e-5]}
metric: val/flow
trials: 2
"""


NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def log_row(recipe: Path, output: Path, name: str, place: str = "sqlite") -> RunFolder:
    """A run of one row, of which MLflow has nothing."""
    overrides = [f"output={output}", f"name={name}"]
    run = RunFolder.create(load_run(recipe, [*overrides, f"tracking.mlflow={place}"]))
    silent = load_run(recipe, [*overrides, "tracking.mlflow=none"])
    with Tracker(run, silent, start=0, environment={}) as tracker:
        tracker.log(1, {"loss/total": 1.0})
    return run


def log_comparison(recipe: Path, output: Path, name: str) -> RunFolder:
    """The only run of a comparison that is finished."""
    run = log_row(recipe, output, f"{name}/none/seed-0")
    write_tags(run.path, {VARIANT: "none"})
    (output / name / "comparison.json").write_text("{}")
    run.write_result({"metrics": {}})
    return run


def sent_runs(output: Path) -> dict[str, Run]:
    """What MLflow has, by name."""
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found)
    return runs


def test_what_is_wrong_with_a_folder_is_told_and_the_others_are_sent(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "alignlab")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "recipe.yaml").write_text("steps: [1")
    (tmp_path / "tuning" / "lr").mkdir(parents=True)
    sweep = sweep_recipe(recipe_file, tmp_path / "tuning" / "lr" / "recipe.yaml", SWEEP)
    sweep.write_text(sweep.read_text().replace("name: recipe", "name: tuning/lr"))
    run = log_row(recipe_file, tmp_path, "depth/late/none/seed-0")
    write_tags(run.path, {VARIANT: "none"})
    trained = log_row(recipe_file, tmp_path, "trained")
    with only_writer(trained.path, wait=False):
        sent = send_folder(tmp_path, to="sqlite")
    assert not sent.complete and len(sent.addresses) == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3, messages
    assert str(tmp_path / "damaged" / "recipe.yaml") in messages[0]
    assert f"no study 'tuning/lr' in sqlite:///{tmp_path}/tuning/lr/study.db" in messages[1]
    assert f"{trained.path} is being trained" in messages[2]
    assert not list(tmp_path.rglob("study.db"))
    runs = sent_runs(tmp_path)
    assert runs.keys() == {"depth/late", "depth/late/none/seed-0"}
    parent, child = runs["depth/late"], runs["depth/late/none/seed-0"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.tags["alignlab.comparison"] == "depth/late"


def test_a_part_of_a_comparison_may_be_named_from_inside_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = log_comparison(recipe_file, tmp_path, "pair")
    send_folder(tmp_path)
    before = sent_runs(tmp_path)
    assert {r.info.status for r in before.values()} == {"FINISHED"}
    for inside in (run.path, run.path.parent, run.path.parent.parent):
        monkeypatch.chdir(inside)
        assert send_folder(Path()).complete
        after = sent_runs(tmp_path)
        assert after.keys() == before.keys() == {"pair", "pair/none/seed-0"}
        for name, sent in after.items():
            assert (sent.info.run_id, sent.info.status) == (before[name].info.run_id, "FINISHED")
            assert sent.data.tags == before[name].data.tags
    assert not (run.path.parent / "mlflow.json").exists()


def test_a_place_that_is_away_keeps_nothing_from_the_others(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("alignlab.tracking.connection._connections", {})  # of earlier commands
    for name, place in {"a": NOWHERE, "b": "sqlite", "c": NOWHERE, "d": NOWHERE}.items():
        log_row(recipe_file, tmp_path, name, place)
    log_comparison(recipe_file, tmp_path, "pair")
    assert not send_folder(tmp_path).complete
    sent = {name: run.info.status for name, run in sent_runs(tmp_path).items()}
    assert sent == {"b": "KILLED", "pair": "FINISHED", "pair/none/seed-0": "FINISHED"}
    assert caplog.text.count("connection refused") == 1
    assert f"`alignlab track {tmp_path / 'a'}`" in caplog.text
    assert f"{tmp_path / 'c'} and 1 more were not tried there" in caplog.text


def test_a_damaged_run_leaves_no_comparison_open(recipe_file: Path, tmp_path: Path) -> None:
    run = log_comparison(recipe_file, tmp_path, "pair")
    other = log_row(recipe_file, tmp_path, "pair/other/seed-0")
    write_tags(other.path, {VARIANT: "other"})
    (run.path / "environment.json").write_text("{")
    assert not send_folder(tmp_path).complete
    sent = {name: run.info.status for name, run in sent_runs(tmp_path).items()}
    assert sent == {"pair": "FINISHED", "pair/other/seed-0": "KILLED"}


def test_two_at_once_wait_for_each_other(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "alignlab")
    monkeypatch.setattr("alignlab.runs.file_lock.NOTE_EVERY_S", 0.05)
    run = log_comparison(recipe_file, tmp_path, "pair")
    with ThreadPoolExecutor() as pool:
        with only_sender(run.path), only_writer(run.path, wait=False):  # as the other one does
            sending = pool.submit(send_folder, tmp_path)
            told = f"waiting for the process that sends {run.path} to MLflow"
            while told not in caplog.text and not sending.done():
                time.sleep(0.01)
        assert sending.result().complete
    assert told in caplog.text and "is being trained" not in caplog.text
    sent = {name: run.info.status for name, run in sent_runs(tmp_path).items()}
    assert sent == {"pair": "FINISHED", "pair/none/seed-0": "FINISHED"}


def test_a_copied_comparison_gets_runs_of_its_own(recipe_file: Path, tmp_path: Path) -> None:
    log_comparison(recipe_file, tmp_path, "pair")
    send_folder(tmp_path)
    before = sent_runs(tmp_path)
    shutil.copytree(tmp_path / "pair", tmp_path / "copy")
    assert send_folder(tmp_path / "copy").complete
    after = sent_runs(tmp_path)
    assert after.keys() - before.keys() == {"copy", "copy/none/seed-0"}
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    for name in ("pair", "copy"):
        parent = after[f"{name}/none/seed-0"].data.tags["mlflow.parentRunId"]
        assert parent == after[name].info.run_id
    assert all(after[name].data.tags == run.data.tags for name, run in before.items())
