"""Several processes of one command on this machine, which train the runs of a comparison."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.errors import UserError
from alignlab.experiments.launchers import local_workers, several_ranks
from forked_command import ForkedProcess
from run_contents import timeless_contents, timeless_metrics, timeless_rows
from small_recipes import comparison_recipe

WAIT_S = 600  # ends a test that hangs, no other
VARIANTS = """
cost: null
baseline: none
seeds: [0]
variants:
  none: {}
  ra: {objectives: {ra: {name: refalign, teacher: dino, blocks: [0]}}}
"""


def compare(recipe: Path, output: Path, *options: str) -> str:
    asked = ["compare", str(recipe), f"output={output}", "checkpoint.every=1", *options]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def recipe(recipe_file: Path, tmp_path: Path) -> Path:
    return comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)


def test_workers_train_the_runs_that_one_process_would_also_if_one_is_killed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(recipe, tmp_path / "one")
    started: list[ForkedProcess] = []
    two = tmp_path / "two" / "pair"

    def remember(*arguments: Any) -> ForkedProcess:
        started.append(ForkedProcess(*arguments))
        return started[-1]

    def kill_one_at_work() -> None:
        end = time.monotonic() + WAIT_S
        while not list(two.glob("*/seed-0/checkpoints/step-*")) and time.monotonic() < end:
            time.sleep(0.05)
        started[0].kill()

    monkeypatch.setattr(local_workers, "started", remember)
    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    said = compare(recipe, tmp_path / "two", "--workers", "2")
    killer.join()
    assert [worker.returncode for worker in started] == [-signal.SIGKILL, 0]
    assert f"report: {two / 'report.html'}" in said
    for variant in ("none", "ra"):
        one, other = (tmp_path / o / "pair" / variant / "seed-0" for o in ("one", "two"))
        assert timeless_contents(one / "checkpoints") == timeless_contents(other / "checkpoints")
        assert timeless_contents(one / "samples") == timeless_contents(other / "samples")
        assert timeless_rows(one) == timeless_rows(other)
        assert timeless_metrics(one) == timeless_metrics(other)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--join", "--workers", "2"), "--join: this process trains"),
        (("--list-runs", "--join"), "--list-runs: nothing is trained"),
        (("--launcher", "ray", "--workers", "2"), "--workers: on Ray"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    recipe: Path, tmp_path: Path, options: tuple[str, ...], line: str
) -> None:
    result = CliRunner().invoke(app, ["compare", str(recipe), f"output={tmp_path}", *options])
    assert result.exit_code == 2 and line in result.output
    assert list(tmp_path.iterdir()) == [recipe]


def test_workers_are_asked_to_end_and_waited_for(tmp_path: Path) -> None:
    ends = "import signal, sys, time, pathlib\n"
    ends += "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(143)))\n"
    ends += f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(600)"
    worker = subprocess.Popen([sys.executable, "-S", "-c", ends])
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    several_ranks.stop([worker])
    assert worker.returncode == 143


@pytest.mark.parametrize(
    ("code", "error"), [(2, UserError), (1, ChildProcessError), (-signal.SIGKILL, None)]
)
def test_a_worker_ends_as_the_command_would(
    code: int, error: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(
        index: int, count: int, command: object, folder: Path, gpus: int
    ) -> subprocess.Popen[bytes]:
        (folder / f"worker-{index}.log").write_text("error: it was so\n")
        end = f"import os, sys; os.kill(os.getpid(), {-code}) if {code} < 0 else sys.exit({code})"
        return subprocess.Popen([sys.executable, "-S", "-c", end])

    monkeypatch.setattr(local_workers, "_start", start)
    monkeypatch.setattr(local_workers, "LOOK_EVERY_S", 0.05)
    with local_workers.local_workers([], 1, tmp_path) as watch:
        expected = pytest.raises(error, match=r"^worker 1: it was so \(see") if error else None
        with expected or contextlib.nullcontext():
            while watch():
                pass


def test_a_second_signal_kills_the_workers() -> None:
    class Stuck(subprocess.Popen[bytes]):
        asked = 0

        def wait(self, timeout: float | None = None) -> int:
            self.asked += 1
            if self.asked == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    stuck = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    worker = Stuck([sys.executable, "-S", "-c", stuck])
    with pytest.raises(KeyboardInterrupt):
        several_ranks.stop([worker])
    assert worker.returncode in (-signal.SIGKILL, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("needs", "cpus", "workers"),
    [({}, 8, 2), ({}, 1, 1), ({"cpus": 4}, 8, 2), ({"cpus": 5}, 8, 1), ({"memory_gib": 1e6}, 8, 1)],
)
def test_the_demo_has_as_many_workers_as_the_machine_bears(
    monkeypatch: pytest.MonkeyPatch, needs: dict[str, Any], cpus: int, workers: int
) -> None:
    asked: list[Any] = []

    def make(name: str, launch: object, **options: Any) -> NoReturn:
        asked.append(options["workers"])
        raise UserError("nothing is trained here")

    monkeypatch.setattr("alignlab.experiments.launchers.local.num_cpus", lambda: cpus)
    monkeypatch.setattr("alignlab.experiments.launchers.make_launcher", make)
    settings = [f"launch.{name}={value}" for name, value in needs.items()]
    CliRunner().invoke(app, ["demo", *settings])
    CliRunner().invoke(app, ["demo", *settings, "--workers", "3"])
    assert asked == [workers, 3]
