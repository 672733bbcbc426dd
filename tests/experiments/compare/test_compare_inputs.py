"""All runs of a comparison read the same files, whenever and wherever they are trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.compare.run import Plan, prepare
from alignlab.runs.input_record import hold_inputs
from alignlab.train import train
from small_recipes import comparison_recipe

VARIANTS = """
cost: null
baseline: none
seeds: [0, 1]
variants:
  none: {}
  aligned:
    objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2]}
"""
FIRST = ("none", 0)
LAST = ("aligned", 1)


@pytest.fixture
def teacher(teacher_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


@pytest.fixture
def make(recipe_file: Path, teacher: Path, tmp_path: Path) -> Callable[[], CompareConfig]:
    path = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    return lambda: load_compare(path, [f"output={tmp_path}", f"teachers.dino.path={teacher}"])


def begin(plan: Plan, key: tuple[str, int]) -> None:
    """What a run leaves that was begun, without its training."""
    hold_inputs(plan.folders[key], plan.runs[key])
    (plan.folders[key].checkpoints / "step-000001").mkdir(parents=True)


def scale(teacher: Path) -> None:
    file = teacher / "model.safetensors"
    save_file({name: value * 0.5 for name, value in load_file(file).items()}, file)


def test_inputs_that_change_between_two_runs_are_refused_before_the_second(
    make: Callable[[], CompareConfig], teacher: Path
) -> None:
    plan = prepare(make())
    begin(plan, FIRST)
    shutil.copytree(teacher, teacher.with_name("kept"))
    scale(teacher)
    with pytest.raises(UserError) as caught:
        train(plan.runs[LAST])
    assert str(caught.value) == (
        f"{plan.folders[LAST].path}: teachers.dino changed since this run was planned "
        "(model.safetensors): restore it, or give the command again that planned it"
    )
    with pytest.raises(UserError) as caught:
        prepare(make())
    assert str(caught.value) == (
        f"{plan.folders[FIRST].path}: teachers.dino changed since this run began "
        "(model.safetensors): restore it, or choose another name=..."
    )
    shutil.copytree(teacher.with_name("kept"), teacher, dirs_exist_ok=True)
    begin(prepare(make()), LAST)


def test_before_any_run_has_begun_inputs_may_be_mended(
    make: Callable[[], CompareConfig], teacher: Path
) -> None:
    prepare(make())
    scale(teacher)
    begin(prepare(make()), LAST)


def test_runs_that_read_other_files_elsewhere_are_refused(
    make: Callable[[], CompareConfig], teacher: Path
) -> None:
    plan = prepare(make())
    begin(plan, FIRST)
    begin(plan, LAST)
    record = plan.folders[LAST].path / "inputs.json"
    content = json.loads(record.read_text())
    del content["checksum"]
    (entry,) = [one for one in content["inputs"] if one["name"] == "teachers.dino"]
    entry["digest"] = entry["files"]["config.json"] = "0" * 16
    record.write_text(json.dumps(content))
    teacher.rename(teacher.with_name("gone"))  # it is on the machines of the runs alone
    with pytest.raises(UserError) as caught:
        prepare(make())
    assert str(caught.value) == (
        f"{plan.folders[FIRST].path} and {plan.folders[LAST].path} read different teachers.dino "
        "(config.json): remove the one whose files are not those of today, and train it again"
    )


def test_older_runs_are_told_in_one_line(
    make: Callable[[], CompareConfig], caplog: pytest.LogCaptureFixture
) -> None:
    plan = prepare(make())
    for key in (FIRST, LAST):
        begin(plan, key)
        (plan.folders[key].path / "inputs.json").unlink()
    prepare(make())
    assert [r.getMessage() for r in caplog.records] == [
        f"2 of 4 runs began before inputs were recorded, such as {plan.folders[FIRST].path}: "
        "whether they read the same files as the others is not known"
    ]
