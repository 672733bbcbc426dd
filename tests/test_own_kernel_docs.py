"""docs/own-kernel.md, followed to the letter in an empty folder."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from followed_docs import follow, read_page
from made_packages import pip_install, run_python

SHORTER = {
    "bench kernels": "--seconds 0 --widths 64 --blocks 2 --device cpu",
    "train tiny": "data.train_clips=4 data.frames=5 data.size=[48,48] optim.batch_size=2 "
    "eval.clips=2 eval.sample_clips=0 eval.generated_clips=0",
}


@pytest.mark.slow
def test_the_way_from_an_empty_folder_to_a_recipe(tmp_path: Path) -> None:
    files, (addition,), commands = read_page("own-kernel.md")
    assert list(files) == ["my_kernels.py", "test_my_kernels.py", "pyproject.toml"]
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
    installed = tmp_path / "installed"
    installed.mkdir()
    for name in ("my_kernels.py", "test_my_kernels.py"):
        (tmp_path / name).write_text(files[name])

    done = run_python(installed, *shlex.split(commands[0])[1:], cwd=tmp_path)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    follow(tmp_path, commands[1:2], SHORTER)
    subprocess.run(shlex.split(commands[2]), cwd=tmp_path, check=True)
    said = follow(tmp_path, commands[3:5], SHORTER)
    assert "my_kernels:by_product" in said and "written: " in said

    (tmp_path / "pyproject.toml").write_text(files["pyproject.toml"])
    with (tmp_path / "my_kernels.py").open("a") as file:
        file.write(addition)
    pip_install(tmp_path, installed)
    (tmp_path / "my_kernels.py").unlink()  # it is the installed one that is found
    said = follow(tmp_path, commands[6:], SHORTER)
    assert re.search(r"pull_push, impl=by_product +│ works", said)
    stored = next(tmp_path.glob("runs/tiny/*.yaml")).read_text()
    assert "impl: by_product@my-kernels" in stored
