"""Runs of a comparison that something else trains, one by one: `alignlab compare --list-runs`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignlab.cli import app
from small_recipes import comparison_recipe

VARIANTS = "cost: null\nbaseline: none\nseeds: [0, 1]\nvariants:\n  none: {}\n"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def recipe(recipe_file: Path, tmp_path: Path) -> Path:
    return comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)


def test_runs_trained_one_by_one_are_taken_as_they_are(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["compare", str(recipe), f"output={tmp_path}"]
    listed = invoke(*asked, "--list-runs").splitlines()
    runs = [tmp_path / "pair" / "none" / f"seed-{seed}" for seed in (0, 1)]
    assert listed == [str(run / "recipe.yaml") for run in runs]
    invoke("train", listed[0])
    assert invoke(*asked, "--list-runs").splitlines() == listed[1:]
    invoke("train", listed[1])
    assert invoke(*asked, "--list-runs") == ""
    monkeypatch.setattr("alignlab.train.build_run", None)  # nothing is left to train
    assert "report: " in invoke(*asked)


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_only_single_runs_are_for_several_processes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    name = str(recipe) if command == "compare" else "sweep_refalign"
    result = CliRunner().invoke(app, [command, name, f"output={tmp_path}"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: started as 2 processes (WORLD_SIZE), and only")
    assert list(tmp_path.iterdir()) == [recipe]
