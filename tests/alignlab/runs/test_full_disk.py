"""A full disk costs one line and the current step: nothing half-written, nothing lost."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from alignlab.cli import app
from alignlab.recipe import load_run
from alignlab.runs.atomic_files import whole_folder, write_text
from alignlab.training import checkpoint, snapshot
from alignlab.training.setup import build_run

# What safetensors raises on a full disk: no OSError, no errno, no file name.
SAFETENSORS_FULL = "Error while serializing: I/O error: No space left on device (os error 28)"
EVERY_STEP = ("steps=3", "checkpoint.every=1", "checkpoint.keep=9")


def alignlab(recipe: Path, output: Path, *overrides: str) -> Result:
    arguments = ["train", str(recipe), f"output={output}", *EVERY_STEP, *overrides]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})


def refused(result: Result, where: Path) -> None:
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: the disk is full")
    assert str(where) in result.stderr


def full_at_step_2(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.parent.name == ".step-000002.tmp" and path.name == "optimizer.safetensors":
        path.write_bytes(b"half")
        raise SafetensorError(SAFETENSORS_FULL)
    save_file(tensors, path)


def test_full_while_a_checkpoint_is_written(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "save_file", full_at_step_2)
        refused(alignlab(recipe_file, tmp_path), run / "checkpoints" / "step-000002")
    assert os.listdir(run / "checkpoints") == ["step-000001"]
    assert not [p for p in run.rglob(".*") if not p.name.startswith((".writer", ".mlflow"))]
    state = build_run(load_run(recipe_file, ["steps=3"])).state
    checkpoint.restore(state, run / "checkpoints" / "step-000001")
    assert state.step == 1
    # with space again, the same command resumes
    result = alignlab(recipe_file, tmp_path)
    assert result.exit_code == 0, result.output
    assert (run / "result.json").exists()


def test_full_while_the_log_is_written(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_at_step_2(self: Any, step: int, scalars: dict[str, float]) -> None:
        if step == 2:
            with self._folder.metrics.open("a") as file:
                file.write('{"step": 2, "ti')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder.metrics))
        log(self, step, scalars)

    from alignlab.runs.metric_rows import read_rows
    from alignlab.tracking import Tracker

    log = Tracker.log
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", full_at_step_2)
        refused(alignlab(recipe_file, tmp_path), tmp_path / "run" / "metrics.jsonl")
    assert alignlab(recipe_file, tmp_path).exit_code == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]


def test_a_text_file_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "result.json"
    write_text(path, "old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_text(path, "a longer new text")
    assert error.value.filename == str(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "step-000001"
    with whole_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(type(error)), whole_folder(target) as folder:
        (folder / "a").write_text("new")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert (target / "a").read_text() == "old"
    with whole_folder(target) as folder:
        (folder / "b").write_text("newest")
    assert [p.name for p in tmp_path.rglob("*")] == ["step-000001", "b"]


def test_full_under_the_mlflow_database(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise MlflowException("(sqlite3.OperationalError) database or disk is full")

    monkeypatch.setattr(MlflowClient, "log_batch", full)
    monkeypatch.setattr(MlflowClient, "set_terminated", full)
    result = alignlab(recipe_file, tmp_path, "tracking.mlflow=sqlite")
    # it may lie on a disk of its own: training goes on
    assert result.exit_code == 0, result.output
    assert caplog.text.count("database or disk is full: nothing is lost") == 1
    assert caplog.text.count(f"`alignlab track {tmp_path / 'run'}`") == 1


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux namespaces")
def test_a_disk_that_is_really_full(recipe_file: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "alignlab.cli", "train", str(recipe_file)]
    command += [f"output={disk}", "tracking.mlflow=sqlite", *EVERY_STEP, "steps=99"]
    script = 'mount -t tmpfs -o size=6m tmpfs "$0" || exit 77; "$@"; rc=$?; find "$0"; exit $rc'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, disk, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr}")
    assert done.returncode == 1, done.stderr
    assert done.stderr.split("\n")[-2].startswith(f"error: the disk is full ({disk}"), done.stderr
    assert "Traceback" not in done.stderr
    found = [Path(line).relative_to(disk) for line in done.stdout.split("\n") if line]
    assert Path("run/checkpoints/step-000001/optimizer.safetensors") in found
    hidden = {path.name for path in found if path.name.startswith(".")}
    assert hidden <= {".writer", ".writer.lock", ".mlflow.lock"}
