"""Several worker processes on one study: SQLite, a journal file, a real PostgreSQL server."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from optuna.trial import TrialState

from alignlab.errors import UserError
from alignlab.experiments.launchers import local_workers
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.lease import LEASE
from alignlab.experiments.sweep.study import SweepStudy, create_study, join_study
from alignlab.runs.metric_rows import read_rows
from forked_command import ForkedCommand, ForkedProcess
from run_contents import read_table
from small_recipes import sweep_recipe

WAIT_S = 900  # ends a test that hangs, no other: everything takes longer on a busy machine
SWEEP = """
checkpoint: {every: 1, keep: 1}
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
  objectives.ra.blocks: {kind: blocks, choose: single, last: 3}
metric: val/flow
"""
TWO_CHOICES = """
space:
  objectives.ra.weight: {kind: categorical, choices: [0.5, 1.0]}
sampler: random
metric: val/flow
trials: 6
"""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep_recipe(recipe_file, tmp_path_factory.mktemp("workers") / "sweep.yaml", SWEEP)


def command(recipe: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "alignlab.cli", "sweep", str(recipe), *arguments]


def run_sweep(recipe: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(recipe, *arguments), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def held_trial(study: SweepStudy, folder: Path) -> tuple[int, int]:
    """Number and worker's process, stopped, of a trial that has a checkpoint and no result."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        begun = any(folder.glob("trial-*/seed-0/checkpoints/step-*"))  # costs less than to ask
        for trial in study.trials(TrialState.RUNNING) if begun else ():
            run = folder / f"trial-{trial.number:04d}" / "seed-0"
            claim = trial.user_attrs.get(LEASE)
            if (
                claim
                and list(run.glob("checkpoints/step-*"))
                and not (run / "result.json").exists()
            ):
                pid = int(claim["pid"])
                os.kill(pid, signal.SIGSTOP)  # else it may end its trial before it is killed
                if not (run / "result.json").exists():
                    return trial.number, pid
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
    raise AssertionError("no worker was caught in a trial")


def check_every_trial(folder: Path, study: SweepStudy, count: int) -> None:
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(count))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    results = sorted(path.parts[-3] for path in folder.glob("trial-*/seed-0/result.json"))
    assert results == [f"trial-{number:04d}" for number in range(count)]
    rows = read_table(folder / "trials.csv")
    assert [row["state"] for row in rows] == ["complete"] * count
    for trial, row in zip(trials, rows, strict=True):
        assert float(row["val/flow"]) == trial.value


def fork_workers() -> None:
    """In a process of the command: its workers take no seconds to start."""
    os.environ.update(OMP_NUM_THREADS="1")
    setattr(local_workers, "started", ForkedProcess)  # noqa: B010


def test_a_killed_workers_trial_is_neither_lost_nor_counted_twice(
    recipe: Path, tmp_path: Path
) -> None:
    overrides = [f"output={tmp_path}", "trials=3", "steps=12"]
    study = create_study(load_sweep(recipe, overrides))
    folder = tmp_path / "sweep"
    log = tmp_path / "out.txt"
    running = ForkedCommand(["sweep", str(recipe), *overrides, "--workers", "2"], log)
    running.start(fork_workers)
    try:
        number, pid = held_trial(study, folder)
        os.kill(pid, signal.SIGKILL)
        killed = time.time()
        status = running.wait(WAIT_S)
    except BaseException:
        running.kill()
        raise
    text = log.read_text()
    assert status == 0, text
    assert "was killed by signal 9" in text
    logs = "".join(path.read_text() for path in folder.glob("worker-*.log"))
    assert logs.count(f"trial {number}: its worker died, it resumes from its checkpoint") == 1
    check_every_trial(folder, study, 3)
    rows = read_rows(folder / f"trial-{number:04d}" / "seed-0" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(13), 12]
    assert rows[1]["time"] < killed < rows[-1]["time"], "the steps before the kill are kept"


@pytest.mark.slow
def test_two_workers_train_two_choices_once_each(recipe_file: Path, tmp_path: Path) -> None:
    recipe = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", TWO_CHOICES)
    run_sweep(recipe, f"output={tmp_path}", "--workers", "2")
    rows = read_table(tmp_path / "sweep" / "trials.csv")
    assert [row["state"] for row in rows] == ["complete"] * 6
    assert sum(bool(row["same_as"]) for row in rows) == 4
    assert len(list(tmp_path.glob("sweep/trial-*/seed-0/result.json"))) == 2


@pytest.mark.slow
def test_two_workers_share_a_journal_file(recipe: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", "trials=4", f"storage=journal://{tmp_path}/study.journal"]
    assert "results: " in run_sweep(recipe, *overrides, "--workers", "2")
    study = join_study(load_sweep(recipe, overrides))
    check_every_trial(tmp_path / "sweep", study, 4)
    assert (tmp_path / "study.journal").is_file() and not list(tmp_path.rglob("study.db"))


@pytest.mark.slow
def test_two_workers_share_a_postgresql_server(recipe: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs a driver: pip install 'alignlab[postgres]'")
    with postgres_server() as url:
        overrides = [f"output={tmp_path}", "trials=4", f"storage={url}"]
        run_sweep(recipe, *overrides, "--workers", "2")
        study = join_study(load_sweep(recipe, overrides))
        check_every_trial(tmp_path / "sweep", study, 4)
        lost = [f"storage={url.replace('/postgres', '/nowhere')}", *overrides[:2]]
        with pytest.raises(UserError, match='"nowhere" does not exist'):
            create_study(load_sweep(recipe, lost))


@contextmanager
def postgres_server() -> Iterator[str]:
    """A server of Debian's postgresql with data of its own, run by a user that is not root."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not versions:
        pytest.skip("needs PostgreSQL's server: apt-get install -y postgresql")
    user = "postgres" if os.geteuid() == 0 else None
    # not under pytest's folder, which other users may not enter
    home = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    if user is not None:
        shutil.chown(home, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [versions[-1] / program, "-D", home / "data", *arguments],
            user=user,
            cwd=home,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    try:
        call("initdb", "--auth=trust", "--username=postgres", "--no-sync")
        call("pg_ctl", "-w", "-l", f"{home}/log", "-o", f"-p {port} -k {home} -F", "start")
        try:
            yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)


@pytest.mark.slow
def test_a_workers_error_ends_the_sweep_with_its_line(recipe: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", "trials=2", "teachers.dino.path=assets/nothing"]
    done = subprocess.run(
        command(recipe, *overrides, "--workers", "2"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: worker" in done.stderr and "assets/nothing" in done.stderr
    states = {t.state for t in join_study(load_sweep(recipe, overrides)).trials()}
    assert states == {TrialState.WAITING}
