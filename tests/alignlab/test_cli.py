"""The command line: what it prints, and the one line and exit code of a mistake."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors import SafetensorError
from sqlalchemy.exc import OperationalError

from alignlab.config.recipe_file import shipped_recipes
from alignlab.experiments.compare.config import load_compare
from alignlab.losses import OBJECTIVES
from alignlab.recipe import load_run
from alignlab.teachers import TEACHERS
from command_line import alignlab, refused

COMMANDS = [
    "train",
    "stage1",
    "compare",
    "report",
    "sweep",
    "runs",
    "init",
    "demo",
    "findings",
    "evaluate",
    "sample",
    "export",
    "probe",
    "doctor",
    "list",
    "data",
    "assets",
    "teachers",
]


def test_help_names_every_command() -> None:
    result = alignlab("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"│ {command} " in result.stdout


def test_the_version_is_told() -> None:
    assert alignlab("--version").stdout == f"alignlab {version('alignlab')}\n"


@pytest.mark.parametrize(
    "command", [*COMMANDS, "list objectives", "data preview", "assets build", "teachers score"]
)
def test_every_command_has_help(command: str) -> None:
    result = alignlab(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from alignlab.cli import app;"
        "asked = [command.split() for command in sys.argv[1:]];"
        "failed = [a for a in asked if CliRunner().invoke(app, [*a, '--help']).exit_code];"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'mlflow', 'omegaconf', 'pandas',"
        " 'optuna', 'ray', 'scipy', 'sklearn', 'accelerate', 'matplotlib', 'jinja2'};"
        "found = failed or heavy & set(sys.modules); sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "", *COMMANDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_installed_command_answers_from_any_folder(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("alignlab")
    done = subprocess.run(
        [command, "train", "nowhere.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere.yaml: no such file") and "tiny" in done.stderr


def test_print_config_is_a_recipe(tmp_path: Path) -> None:
    result = alignlab("train", "tiny", "steps=7", "--print-config")
    assert result.exit_code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(result.stdout)
    assert load_run(path) == load_run("tiny", ["steps=7"])


@pytest.mark.parametrize("arguments", [("compare", "demo"), ("demo",)])
def test_print_config_of_a_comparison(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = alignlab(*arguments, "seeds=[5]", "--print-config")
    path = tmp_path / "printed.yaml"
    path.write_text(result.stdout)
    assert load_compare(path) == load_compare("demo", ["seeds=[5]"])
    _, _, variants = result.stdout.partition("# variant none, resolved:\n")
    assert variants.startswith("# objectives: {}\n# variant refalign, resolved:\n")
    assert "#     neg_weight: 1.0\n" in variants and "note:" not in result.stdout


def test_a_baseline_with_an_objective_is_told() -> None:
    shown = alignlab("compare", "demo", "baseline=repa", "--print-config").stdout
    assert "# note: the baseline repa trains repa (repa): differences are against that" in shown


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    assert "did you mean 'steps'?" in refused("train", "tiny", "setps=3")
    assert "alignlab compare demo" in refused("train", "demo")
    assert "names a seed twice" in refused("demo", "seeds=[1,1]")


def test_sample_checks_run_and_references(tmp_path: Path) -> None:
    assert "no such file: nofile.png" in refused(
        "sample", str(tmp_path), "--prompt", "x", "--reference", "nofile.png"
    )
    assert "no run there" in refused("sample", str(tmp_path), "--prompt", "x")
    assert "no run there" in refused("export", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "runs/x"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full")),
    ],
)
def test_full_disk_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: object) -> NoReturn:
        raise error

    monkeypatch.setattr("alignlab.train.train", full)
    result = alignlab("train", "tiny")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the disk is full")
    assert os.getcwd() not in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), RuntimeError("x"), SafetensorError("x"), BrokenPipeError(32, "x")],
)
def test_other_errors_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: object) -> NoReturn:
        raise error

    monkeypatch.setattr("alignlab.train.train", broken)
    result = alignlab("train", "tiny")
    assert result.exception is error or (result.exit_code == 1 and "error" not in result.output)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("objectives", list(OBJECTIVES)),
        ("teachers", list(TEACHERS)),
        ("recipes", list(shipped_recipes())),
        ("data", ["shapes", "folder", "data.frames"]),
    ],
)
def test_lists(what: str, names: list[str]) -> None:
    result = alignlab("list", what)
    assert result.exit_code == 0
    for name in names:
        assert name in result.stdout


def test_a_list_of_teachers_says_what_they_take_and_who_uses_them() -> None:
    of_qwen = alignlab("list", "teachers").stdout.split("qwen2_5_vl\n")[1].splitlines()[:2]
    assert of_qwen == [
        "  Qwen/Qwen2.5-VL-7B-Instruct, merged, unless set",
        "  takes frames; tokens 3584 wide, of 28x28 pixels; used by RefAlign (ablation)",
    ]
    rows = {row["name"]: row for row in json.loads(alignlab("list", "teachers", "--json").stdout)}
    assert (rows["tiny-dino"]["width"], rows["tiny-dino"]["patch"]) == (96, 16)
    assert rows["vjepa2"]["video"] and rows["vjepa2"]["papers"] == ["SARA"]
