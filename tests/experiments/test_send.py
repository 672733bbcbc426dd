"""What MLflow lacks of a folder that holds several things, some of which are damaged."""

import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient

from alignlab.experiments.compare.tracking import VARIANT
from alignlab.experiments.send import send_folder
from alignlab.recipe import load_run
from alignlab.runs.run_folder import RunFolder, only_writer
from alignlab.tracking import Tracker
from alignlab.tracking.mlflow_run import write_tags
from small_recipes import sweep_recipe

SWEEP = """
space:
  optim.lr: {kind: categorical, choices: [5.0e-3, 1.0e-5]}
metric: val/flow
trials: 2
"""


def log_row(recipe: Path, output: Path, name: str) -> RunFolder:
    """A run of one row, of which MLflow has nothing."""
    config = load_run(recipe, [f"output={output}", f"name={name}", "tracking.mlflow=none"])
    run = RunFolder.create(config)
    with Tracker(run, config, start=0, environment={}) as tracker:
        tracker.log(1, {"loss/total": 1.0})
    return run


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
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("depth")
    assert experiment is not None
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"depth/late", "depth/late/none/seed-0"}
    parent, child = runs["depth/late"], runs["depth/late/none/seed-0"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.tags["alignlab.comparison"] == "depth/late"
