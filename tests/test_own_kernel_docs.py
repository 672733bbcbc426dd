"""docs/own-kernel.md, followed to the letter in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOC = Path(__file__).parents[1] / "docs" / "own-kernel.md"
SHORTER = {
    "bench kernels": "--seconds 0 --widths 64 --blocks 2 --device cpu",
    "train tiny": "data.train_clips=4 data.frames=5 data.size=[48,48] optim.batch_size=2 "
    "eval.clips=2 eval.sample_clips=0 eval.generated_clips=0",
}
FLAGS = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
# A process that imports alignlab takes seconds: one runs all of its commands.
COMMANDS = """
import json, sys
from typer.testing import CliRunner
from alignlab.cli import app
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words)
    print(" ".join(words), done.output)
    assert done.exit_code == 0, (words, done.output, done.exception)
"""


def run(folder: Path, *words: str) -> str:
    paths = [str(folder / "installed"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alignlab(folder: Path, commands: list[str]) -> str:
    """Runs lines of the docs, shortened; gives all that they print."""
    words = [shlex.split(command)[1:] for command in commands]
    words = [[*line, *SHORTER.get(" ".join(line[:2]), "").split()] for line in words]
    return run(folder, "-c", COMMANDS, json.dumps(words))


@pytest.mark.slow
def test_the_way_from_an_empty_folder_to_a_recipe(tmp_path: Path) -> None:
    text = DOC.read_text()
    blocks = re.findall(r"^(?:`([\w.]+)`:\n\n)?```\w+\n(.*?)```", text, flags=re.M | re.S)
    files = {name: block for name, block in blocks if name}
    assert list(files) == ["my_kernels.py", "test_my_kernels.py", "pyproject.toml"]
    (addition,) = [block for name, block in blocks if not name]
    commands = re.findall(r"^ {4}((?:python|alignlab|cp|pip) .+)$", text, flags=re.M)
    kinds = [command.split()[0] for command in commands]
    assert kinds == [
        "python",
        "alignlab",
        "cp",
        "alignlab",
        "alignlab",
        "pip",
        "alignlab",
        "alignlab",
    ]
    for name in ("my_kernels.py", "test_my_kernels.py"):
        (tmp_path / name).write_text(files[name])

    assert " passed" in run(tmp_path, *shlex.split(commands[0])[1:])
    alignlab(tmp_path, commands[1:2])
    subprocess.run(shlex.split(commands[2]), cwd=tmp_path, check=True)
    said = alignlab(tmp_path, commands[3:5])
    assert "my_kernels:by_product" in said and "written: " in said

    (tmp_path / "pyproject.toml").write_text(files["pyproject.toml"])
    with (tmp_path / "my_kernels.py").open("a") as file:
        file.write(addition)
    run(tmp_path, "-m", "pip", "install", "--quiet", *FLAGS, "--target", "installed", ".")
    (tmp_path / "my_kernels.py").unlink()  # it is the installed one that is found
    said = alignlab(tmp_path, commands[6:])
    assert re.search(r"pull_push, impl=by_product +│ works", said)
    stored = next(tmp_path.glob("runs/tiny/*.yaml")).read_text()
    assert "impl: by_product@my-kernels" in stored
