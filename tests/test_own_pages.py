"""docs/own-objective.md and docs/own-teacher.md, followed in an empty folder."""

import shlex
from pathlib import Path

import pytest
import yaml

from followed_docs import follow, read_page
from made_packages import pip_install, run_python

SHORTER = {
    "train tiny": "data.train_clips=4 data.frames=5 data.size=[48,48] optim.batch_size=2 "
    "eval.clips=2 eval.sample_clips=0 eval.generated_clips=0",
    "teachers score": "data.train_clips=4 data.frames=5 data.size=[64,64]",
}
BASE = """
name: part
steps: 2
model: {path: assets/tiny-wan}
data: {name: shapes, frames: 5, size: [48, 48]}
teachers:
  dino: {family: tiny-dino}
"""


def write_recipe(path: Path, fragment: str, **more: object) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(BASE) | yaml.safe_load(fragment) | more))


@pytest.mark.slow
def test_an_objective_from_an_empty_folder_to_a_training(tmp_path: Path) -> None:
    files, (variants,), (pip, listed, tested, trained) = read_page("own-objective.md")
    assert list(files) == ["my_objective.py", "pyproject.toml", "test_my_objective.py"]
    assert pip == "pip install -e ."
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    installed = tmp_path / "installed"
    installed.mkdir()
    pip_install(tmp_path, installed)
    (tmp_path / "my_objective.py").unlink()  # it is the installed one that is found

    done = run_python(installed, *shlex.split(tested)[1:], cwd=tmp_path)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    write_recipe(tmp_path / "part.yaml", variants, baseline="none", seeds=[0])
    commands = [listed, trained, "alignlab compare part.yaml --print-config"]
    said = follow(tmp_path, commands, SHORTER)
    assert "Cosine to the teacher's token of the same place, both less their mean" in said
    assert "loss/mine" in (tmp_path / "runs/tiny/metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_teacher_from_a_folder_to_a_family(tmp_path: Path) -> None:
    files, (teachers,), commands = read_page("own-teacher.md")
    assert list(files) == ["my_teacher.py", "pyproject.toml"]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    installed = tmp_path / "installed"
    installed.mkdir()
    pip_install(tmp_path, installed)
    (tmp_path / "my_teacher.py").unlink()  # it is the installed one that is found
    objective = {"ra": {"name": "refalign", "teacher": "early", "blocks": [1]}}
    write_recipe(tmp_path / "part.yaml", teachers, objectives=objective)

    commands.remove("pip install -e .")
    commands.append("alignlab train part.yaml eval.clips=2 data.train_clips=4")
    said = follow(tmp_path, commands, SHORTER)
    assert "half-dino" in said
    assert "half-dino" in (tmp_path / "runs/tiny/recipe.yaml").read_text()
    assert (tmp_path / "runs/part/result.json").is_file()
