"""`alignlab verify` of comparisons, sweeps and Stage 1 folders."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.compare.result import RunResult
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.study import create_study
from alignlab.experiments.verify import verify_folder
from alignlab.runs.checksums import write_checksums, write_json
from command_line import alignlab
from damage import KINDS, flip, garbage
from made_comparisons import make_comparison
from small_recipes import sweep_recipe

Damage = Callable[[Path], None]


@pytest.fixture
def comparison(full_run: Path, tmp_path: Path) -> Path:
    """A comparison of one run."""
    folder = tmp_path / "pair"
    shutil.copytree(full_run, folder / "none" / "seed-0")
    run = RunResult("none", 0, 2, "none/seed-0", {"val/flow": 0.5}, {})
    make_comparison([run]).save(folder / "comparison.json")
    (folder / "table.csv").write_text("variant,value\nnone,0.5\n")
    write_json(folder / "progress.json", {"seconds": 1.5})
    write_checksums(folder, ["comparison.json", "table.csv", "progress.json"])
    return folder


@pytest.mark.parametrize("damage", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    "file", ["comparison.json", "table.csv", "progress.json", "none/seed-0/metrics.jsonl"]
)
def test_a_damaged_file_of_a_comparison_is_named(
    comparison: Path, file: str, damage: Damage
) -> None:
    assert verify_folder(comparison).damaged == {}
    damage(comparison / file)
    lines = verify_folder(comparison).damaged.values()
    assert any(str(comparison / file) in line for line in lines), lines


def test_a_measured_cost_is_verified(comparison: Path) -> None:
    cost = comparison / "cost.json"
    write_json(cost, {"key": {}, "cost": {}})
    found = verify_folder(comparison)
    assert cost in found.files and not found.damaged
    flip(cost)
    assert verify_folder(comparison).damaged.keys() == {cost}


def test_a_run_that_a_comparison_has_lost_is_named(comparison: Path) -> None:
    shutil.rmtree(comparison / "none")
    (line,) = verify_folder(comparison).damaged.values()
    assert str(comparison / "none/seed-0/result.json") in line
    result = alignlab("verify", comparison)
    assert result.exit_code == 1 and line in result.stdout


def test_results_that_were_passed_on_without_their_runs_are_whole(comparison: Path) -> None:
    for name in ("none", "progress.json", "checksums.json"):
        path = comparison / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = verify_folder(comparison)
    assert found.damaged == {} and found.files == {comparison / "comparison.json"}
    assert found.unknown == [
        f"{comparison}: is a copy without the folders of its runs: comparison.json alone was read"
    ]
    garbage(comparison / "comparison.json")
    assert verify_folder(comparison).damaged.keys() == {comparison / "comparison.json"}


def test_a_sweep_and_its_study_are_verified(recipe_file: Path, tmp_path: Path) -> None:
    space = "space: {objectives.ra.weight: {kind: float, low: 0.1, high: 1.0}}\n"
    recipe = sweep_recipe(
        recipe_file, tmp_path / "sweep.yaml", f"{space}metric: val/flow\ntrials: 2\n"
    )
    create_study(load_sweep(recipe, [f"output={tmp_path}"]))
    folder = tmp_path / "sweep"
    found = verify_folder(folder)
    assert (found.damaged, found.files) == ({}, {folder / "study.db"})
    assert "its command did not end" in found.unknown[0]
    (folder / "best.yaml").write_text("steps: 2\n")
    write_checksums(folder, ["best.yaml", "study.db"])
    assert verify_folder(folder).unknown == []
    flip(folder / "study.db")
    flip(folder / "best.yaml")
    assert verify_folder(folder).damaged.keys() == {folder / "best.yaml", folder / "study.db"}
    garbage(folder / "study.db")
    assert "not a database" in verify_folder(folder).damaged[folder / "study.db"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run, Stage 1 network, comparison or sweep there"):
        verify_folder(tmp_path)


def test_a_stage_1_folder_is_verified(tmp_path: Path) -> None:
    for name in ("model.safetensors", "stage1.json"):
        (tmp_path / name).write_text("{}")
    assert "before checksums" in verify_folder(tmp_path).unknown[0]
    write_checksums(tmp_path)
    assert verify_folder(tmp_path).damaged == {}
    flip(tmp_path / "model.safetensors")
    (line,) = verify_folder(tmp_path).damaged.values()
    assert "model.safetensors is damaged" in line


def test_a_folder_of_all_runs_is_no_command_that_did_not_end(comparison: Path) -> None:
    """And what lies beside the runs of a comparison in it is read too."""
    runs = comparison.parent
    found = verify_folder(runs)
    assert (found.damaged, found.unknown) == ({}, [])
    assert comparison / "table.csv" in found.files
    flip(comparison / "table.csv")
    assert comparison / "table.csv" in verify_folder(runs).damaged


def test_a_run_of_a_pruned_trial_is_not_said_to_be_unfinished(
    full_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "trial-0003" / "seed-0"
    shutil.copytree(full_run, run)
    (run / "result.json").unlink()
    for state, said in (("pruned", "its trial was pruned"), ("fail", "the run is not finished")):
        (tmp_path / "trials.csv").write_text(f"trial,state,folder\n3,{state},trial-0003\n")
        write_checksums(tmp_path, ["trials.csv"])
        for folder in (tmp_path, run):
            (note,) = verify_folder(folder).unknown
            assert note.startswith(f"{run}: {said}")
