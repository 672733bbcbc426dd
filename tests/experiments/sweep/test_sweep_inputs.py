"""All trials of a sweep read the same files."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alignlab.config.run import RunConfig
from alignlab.environment import describe_environment
from alignlab.errors import UserError
from alignlab.experiments.launchers import local
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import join_study
from alignlab.runs.input_record import InputRecord, hold_inputs
from alignlab.runs.run_folder import RunFolder
from small_recipes import sweep_recipe

SWEEP = """
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
metric: val/flow
trials: 3
"""


class Trainings:
    """Stands for the training of runs; `before` is called before the run of that number."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.before: dict[int, object] = {}

    def __call__(self, run: RunConfig, **_: object) -> Path:
        change = self.before.get(len(self.names))
        if callable(change):
            change()
        folder = RunFolder.create(run)
        hold_inputs(folder, run)
        (folder.path / "environment.json").write_text(json.dumps(describe_environment()))
        metrics = {"val/flow": run.objectives["ra"].weight}
        folder.result.write_text(json.dumps({"steps": run.steps, "metrics": metrics}))
        self.names.append(run.name)
        return folder.path


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    fake = Trainings()
    monkeypatch.setattr(local, "train", fake)
    return fake


def test_trials_on_other_inputs_than_the_first_are_refused(
    recipe_file: Path, teacher_folder: Path, tmp_path: Path, trainings: Trainings
) -> None:
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    recipe = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", SWEEP)
    config = load_sweep(recipe, [f"output={tmp_path}", f"teachers.dino.path={teacher}"])
    folder = tmp_path / "sweep"

    def scale() -> None:
        file = teacher / "model.safetensors"
        save_file({name: value * 0.5 for name, value in load_file(file).items()}, file)

    # after the sweep has looked and before the run reads them, as another worker may see it
    trainings.before[1] = scale
    with pytest.raises(UserError) as caught:
        sweep(config)
    second = folder / "trial-0001" / "seed-0"
    assert str(caught.value) == (
        f"{folder} and {second} read different teachers.dino (model.safetensors): "
        f"remove {second}, restore the files and resume the sweep"
    )
    begun = list(trainings.names)
    with pytest.raises(UserError) as caught:
        sweep(config.model_copy(update={"trials": 4}))
    assert str(caught.value) == (
        f"{folder}: teachers.dino changed since this sweep began (model.safetensors): restore it, "
        "or choose another name=..."
    )
    assert trainings.names == begun  # no trial was trained
    # and nothing of the sweep is changed
    assert len(join_study(config).trials()) == load_sweep(folder / "recipe.yaml").trials == 3

    shutil.copytree(teacher_folder, teacher, dirs_exist_ok=True)
    shutil.rmtree(second)
    sweep(config)
    assert len(set(trainings.names)) == 3
    names = {name for name, _ in InputRecord(folder, config.output).inputs}
    assert {"model/vae", "teachers.dino"} <= names


def test_an_older_sweep_is_told(
    recipe_file: Path, tmp_path: Path, trainings: Trainings, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", SWEEP)
    config = load_sweep(recipe, [f"output={tmp_path}"])
    sweep(config)
    (tmp_path / "sweep" / "inputs.json").unlink()
    assert "inputs" not in caplog.text
    sweep(config)
    assert caplog.text.count("before inputs were recorded") == 1
