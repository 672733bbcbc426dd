"""docs/own-data.md, followed to the letter in an empty folder."""

import json
import re
import shlex
from pathlib import Path

import pytest

from followed_docs import follow, read_page
from made_packages import pip_install, run_python


@pytest.mark.slow
def test_the_way_from_an_empty_folder_to_a_training(tmp_path: Path) -> None:
    files, others, commands = read_page("own-data.md")
    assert list(files) == ["make_clips.py", "my_data.py", "pyproject.toml", "recipe.yaml"]
    assert others == []
    assert [" ".join(command.split()[:2]) for command in commands] == [
        "python make_clips.py",
        "pip install",
        "alignlab doctor",
        "alignlab list",
        "alignlab data",
        "alignlab train",
        "alignlab cache",
    ]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    installed = tmp_path / "installed"
    installed.mkdir()
    done = run_python(installed, *shlex.split(commands[0])[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pip_install(tmp_path, installed)
    (tmp_path / "my_data.py").unlink()  # it is the installed one that is found

    said = follow(
        tmp_path, commands[2:], {"train recipe.yaml": "steps=2 tracking.mlflow=none eval.clips=2"}
    )
    assert re.search(r"arrays \(package my-data 1.0\) +│ works", said)
    assert "How many of the last clips are held out." in said
    assert "a square moves right over grey 0" in next(tmp_path.rglob("index.html")).read_text()
    run = tmp_path / "runs" / "on-arrays"
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    (data,) = [
        one
        for one in json.loads((run / "inputs.json").read_text())["inputs"]
        if one["name"] == "data"
    ]
    assert {"0.npy", "5.txt", "package my-data 1.0"} <= set(data["files"])
