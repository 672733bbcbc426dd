"""What README and overview say is run: a Python example, and the commands in order, shortened."""

import re
from pathlib import Path

import pytest

from documented_commands import (
    documented_commands,
    front_pages,
    run_shortened,
    untested_length,
)


def commands() -> list[list[str]]:
    return documented_commands(front_pages())


def test_no_command_trains_at_full_length() -> None:
    assert len([c for c in commands() if c[0] in ("train", "compare", "sweep", "stage1")]) >= 8
    assert untested_length(commands()) == []


def test_the_python_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", front_pages(), flags=re.S)
    names: dict[str, object] = {}
    exec(example, names)
    assert getattr(names["student"], "grad", None) is not None


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(run_shortened(commands())) >= 9
    assert (tmp_path / "clip.mp4").is_file()
    assert (tmp_path / "runs/tiny/export/model_index.json").is_file()
    assert (tmp_path / "runs/demo/report.html").is_file()


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z_]+@", front_pages())
