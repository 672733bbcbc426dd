"""Checkpoints that are written while training goes on (`checkpoint.asynchronous`)."""

import errno
import logging
import re
import signal
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from alignlab import interruption
from alignlab.runs.checkpoint_folders import problem, step_folders
from alignlab.train import Trainer, train
from alignlab.training import snapshot
from run_contents import file_contents, timeless_rows
from tiny_runs import MakeConfig

pytestmark = pytest.mark.usefixtures("shared_clips")

SMALL = ("eval.clips=1", "optim.batch_size=1", "optim.ema=0.9", "checkpoint.keep=9")
BACKGROUND = "checkpoint.asynchronous=true"


class SlowDisk:
    """Writes nothing until training has taken one more step, or a second has passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.overtaken: list[str] = []
        self._done = 0
        write, step = snapshot.Snapshot.write, Trainer.step

        def written_later(own: snapshot.Snapshot, folder: Path) -> None:
            end = time.monotonic() + 1.0
            while self._done <= own.step and time.monotonic() < end:
                time.sleep(0.01)
            if self._done > own.step:
                self.overtaken.append(folder.name)
            write(own, folder)

        def stepped(trainer: Any, batches: Any) -> Any:
            scalars = step(trainer, batches)
            self._done = trainer.state.step
            return scalars

        monkeypatch.setattr(snapshot.Snapshot, "write", written_later)
        monkeypatch.setattr(Trainer, "step", stepped)


def saved(run: Path) -> dict[str, bytes]:
    """All files of all checkpoints but for the log's mark, which has times."""
    files = file_contents(run / "checkpoints")
    return {name: content for name, content in files.items() if not name.endswith("log.json")}


def test_what_is_written_is_the_step_not_those_after_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*SMALL, "steps=5", "checkpoint.every=2", "checkpoint.weights_every=1")
    expected = train(make_config(*settings, "name=waiting"))
    disk = SlowDisk(monkeypatch)
    with caplog.at_level(logging.INFO):
        run = train(make_config(*settings, BACKGROUND))
    names = ["weights-000001", "step-000002", "weights-000003", "step-000004"]
    assert disk.overtaken == [f".{name}.tmp" for name in names]
    assert saved(run) == saved(expected)
    assert timeless_rows(run) == timeless_rows(expected)
    (size,) = re.findall(r"step-000004: (\S+) MB copied to main memory", caplog.text)
    files = (run / "checkpoints" / "step-000004").rglob("*.safetensors")
    assert float(size) == pytest.approx(sum(f.stat().st_size for f in files) / 1e6, rel=0.05)


def test_an_error_of_the_thread_stops_the_run_with_its_message(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the step after it; the checkpoint before it is whole and is resumed."""
    settings = (*SMALL, "steps=9", "checkpoint.every=2", "eval.sample_clips=0", BACKGROUND)
    last: list[int] = []

    def full(tensors: Any, path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    def told(trainer: Any, batches: Any) -> Any:
        last.append(trainer.state.step)
        if trainer.state.step >= 4:
            wait([trainer._writer._writing])
        return step(trainer, batches)

    step = Trainer.step
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as error:
        patch.setattr(snapshot, "save_file", full)
        patch.setattr(Trainer, "step", told)
        train(make_config(*settings))
    assert "step-000004" in str(error.value) and last == [0, 1, 2, 3, 4]
    checkpoints = Path(make_config().output) / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    assert problem(checkpoints / "step-000002") is None


def test_a_signal_waits_for_the_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlowDisk(monkeypatch)
    step = Trainer.step

    def stepped(trainer: Any, batches: Any) -> Any:
        if trainer.state.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "step", stepped)
    config = make_config(*SMALL, "steps=9", "checkpoint.every=1", BACKGROUND)
    with interruption.handled(), pytest.raises(interruption.Interrupted) as stop:
        train(config)
    assert "checkpoint at 2" in interruption.line(stop.value)
    folders = step_folders(Path(config.output) / "run" / "checkpoints")
    assert [(path.name, problem(path)) for path in folders] == [
        ("step-000001", None),
        ("step-000002", None),
    ]
