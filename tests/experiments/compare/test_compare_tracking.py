"""A comparison in MLflow: its runs lie under one, also where MLflow was away at the time."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.run import compare
from alignlab.experiments.send import send_folder
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

VARIANTS = """
cost: null
baseline: none
seeds: [0]
aa: true
variants:
  none: {}
  aligned:
    objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2], gate: t^3}
"""
FILES = {
    *("comparison.json", "report.html", "report.md", "figures"),
    *("table.csv", "table.tex", "noise_floor.csv"),
}


def by_name(client: MlflowClient) -> dict[str, Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = {run.info.run_name: run for run in client.search_runs(experiments)}
    assert len(runs) == len(client.search_runs(experiments)) == 4
    return runs


def test_the_runs_of_a_comparison_are_under_one(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("alignlab.tracking.connection._connections", {})  # of earlier commands
    recipe = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    overrides = [f"output={tmp_path}", "steps=1"]
    # nothing listens there
    report = compare(load_compare(recipe, [*overrides, "tracking.mlflow=http://127.0.0.1:9"]))
    assert caplog.text.count("connection refused: nothing is lost") == 1
    assert caplog.text.count("`alignlab track") == 1
    assert f"`alignlab track {report.parent}`" in caplog.text
    sent = send_folder(report.parent, to="sqlite")
    assert sent.complete
    (address,) = sent.addresses
    assert address.endswith("/#/experiments/1/runs")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for again in (False, True):
        if again:  # the runs are finished, and the same ones
            compare(load_compare(recipe, [*overrides, "tracking.mlflow=sqlite"]))
        runs = by_name(client)
        parent = runs["pair"].info
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert {file.path for file in client.list_artifacts(parent.run_id)} == FILES
        figures = {file.path for file in client.list_artifacts(parent.run_id, "figures")}
        assert figures == {f"figures/{file.name}" for file in (report.parent / "figures").iterdir()}
        assert {"figures/charts.pdf", "figures/forest.svg"} <= figures
        for variant in ("none", "aligned", "none-again"):
            tags = runs[f"pair/{variant}/seed-0"].data.tags
            assert tags["mlflow.parentRunId"] == parent.run_id
            assert tags["alignlab.variant"] == variant
            assert tags["alignlab.seed"] == "0" and "alignlab.commit" in tags
