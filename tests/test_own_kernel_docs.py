"""docs/own-kernel.md, followed to the letter in an empty folder."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from docs_walk import blocks, install, run_commands, run_python

DOC = Path(__file__).parents[1] / "docs" / "own-kernel.md"
SHORTER = {
    "bench kernels": "--seconds 0 --widths 64 --blocks 2 --device cpu",
    "train tiny": "data.train_clips=4 data.frames=5 data.size=[48,48] optim.batch_size=2 "
    "eval.clips=2 eval.sample_clips=0 eval.generated_clips=0",
}


@pytest.mark.slow
def test_the_way_from_an_empty_folder_to_a_recipe(tmp_path: Path) -> None:
    text = DOC.read_text()
    files = {name: block for name, block in blocks(text) if name}
    assert list(files) == ["my_kernels.py", "test_my_kernels.py", "pyproject.toml"]
    (addition,) = [block for name, block in blocks(text) if not name]
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

    assert " passed" in run_python(tmp_path, *shlex.split(commands[0])[1:])
    run_commands(tmp_path, commands[1:2], SHORTER)
    subprocess.run(shlex.split(commands[2]), cwd=tmp_path, check=True)
    said = run_commands(tmp_path, commands[3:5], SHORTER)
    assert "my_kernels:by_product" in said and "written: " in said

    (tmp_path / "pyproject.toml").write_text(files["pyproject.toml"])
    with (tmp_path / "my_kernels.py").open("a") as file:
        file.write(addition)
    install(tmp_path)
    (tmp_path / "my_kernels.py").unlink()  # it is the installed one that is found
    said = run_commands(tmp_path, commands[6:], SHORTER)
    assert re.search(r"pull_push, impl=by_product +│ works", said)
    stored = next(tmp_path.glob("runs/tiny/*.yaml")).read_text()
    assert "impl: by_product@my-kernels" in stored
