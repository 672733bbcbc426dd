"""Sweeps on real Ray clusters: two nodes one of which is killed, a SIGTERM, an error, a storage."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

import ray_tools
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.lease import LEASE
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import SweepStudy, create_study, sweep_folder
from alignlab.runs.metric_rows import read_rows
from processes import descendants, parents
from run_contents import read_table, timeless
from small_recipes import sweep_recipe

pytest.importorskip("ray", reason="needs Ray: pip install 'alignlab[ray]'")

STEPS = 20
WAIT_S = 400  # ends a test that hangs
TRIALS = 6
SWEEP = """
launch: {cpus: 1}
checkpoint: {every: 1}
space:
  objectives.ra.weight: {kind: categorical, choices: [0.5, 1.0, 2.0]}
  objectives.ra.blocks: {kind: blocks, choose: single, first: 1, last: 2}
sampler: grid
metric: val/flow
"""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep_recipe(recipe_file, tmp_path_factory.mktemp("sweep") / "sweep.yaml", SWEEP)


@pytest.fixture(scope="module")
def local_rows(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What one local worker finds."""
    output = tmp_path_factory.mktemp("local")
    sweep(load_sweep(recipe, overrides(output)))
    return rows_of(output / "sweep")


def overrides(output: Path) -> list[str]:
    return [f"output={output}", f"steps={STEPS}"]


def arguments(recipe: Path, output: Path, *options: str) -> list[str]:
    return ["sweep", str(recipe), *overrides(output), "--launcher", "ray", *options]


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The trials, without what is measured by a clock."""
    return [timeless(row) for row in read_table(folder / "trials.csv")]


def caught_trial(study: SweepStudy, below: int, driver: subprocess.Popen[bytes]) -> tuple[int, int]:
    """A trial in its middle that a process of this node runs, and that process, stopped."""
    folder = sweep_folder(study.config)
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and driver.poll() is None:
        for trial in study.trials(TrialState.RUNNING):
            run = folder / f"trial-{trial.number:04d}" / "seed-0"
            pid = int((trial.user_attrs.get(LEASE) or {"pid": 0})["pid"])
            if pid in descendants(below) and list(run.glob("checkpoints/step-*")):
                os.kill(pid, signal.SIGSTOP)  # else it may end its trial before it is killed
                if not (run / "result.json").exists():
                    return trial.number, pid
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError("no trial was caught in its middle")


@pytest.mark.slow
def test_a_killed_nodes_trial_resumes_elsewhere_and_all_end_as_if_nothing_had_happened(
    recipe: Path, local_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    log, folder = tmp_path / "out.txt", tmp_path / "sweep"
    study = create_study(load_sweep(recipe, overrides(tmp_path)))
    words = arguments(recipe, tmp_path, "--ray-address")
    with (
        ray_tools.nodes("") as cluster,
        ray_tools.command(log, *words, cluster.address) as driver,
    ):
        number, _ = caught_trial(study, cluster.raylets[1], driver)
        cluster.kill(1)
        when = time.time()
        run = folder / f"trial-{number:04d}" / "seed-0"
        assert driver.wait(WAIT_S) == 0, log.read_text()
    text = log.read_text()
    assert f"trials to run: {TRIALS}, nodes: 2; each takes 1 CPU\n" in text
    assert "worker " in text and " died (" in text
    assert f"trial {number}: its worker died, it resumes from its checkpoint" in text
    assert "Traceback" not in text and "results: " in text
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    logs = [path.read_text() for path in folder.glob("worker-*.log")]
    assert sum(text.count(" trials finished") for text in logs) == TRIALS, "none finished twice"
    rows = read_rows(run / "metrics.jsonl")
    assert rows[1]["time"] < when < rows[-1]["time"], "the steps before the kill are kept"
    assert len(local_rows) == TRIALS and rows_of(folder) == local_rows


@pytest.mark.slow
def test_a_terminated_sweep_puts_its_trials_back_and_resumes_with_either_launcher(
    recipe: Path, local_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """One node, started by the command itself."""
    log, folder = tmp_path / "out.txt", tmp_path / "sweep"
    config = load_sweep(recipe, overrides(tmp_path))
    study = create_study(config)
    with ray_tools.command(log, *arguments(recipe, tmp_path, "--workers", "1")) as driver:
        _, pid = caught_trial(study, driver.pid, driver)
        os.kill(pid, signal.SIGCONT)
        os.kill(driver.pid, signal.SIGTERM)  # as a scheduler does
        assert driver.wait(WAIT_S) == 143, log.read_text()
        assert pid not in parents(), "the trial continues without the command"
    assert "Traceback" not in log.read_text()
    assert "ended by Interrupted('SIGTERM')" in (folder / "worker-1.log").read_text()
    assert not study.trials(TrialState.RUNNING) and study.trials(TrialState.WAITING)
    sweep(config)
    assert rows_of(folder) == local_rows


@pytest.mark.slow
def test_an_error_of_a_worker_ends_the_sweep_with_one_line(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    with ray_tools.command(log, *arguments(recipe, tmp_path, "model.path=nothing/there")) as driver:
        assert driver.wait(WAIT_S) == 2, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text
    (line,) = [line for line in text.split("\n") if line.startswith("error: ")]
    assert line.startswith("error: worker ") and "nothing/there" in line


@pytest.mark.slow
def test_several_machines_share_a_journal_but_no_sqlite_file(
    recipe: Path, local_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    log, folder = tmp_path / "out.txt", tmp_path / "sweep"
    journal = f"storage=journal://{tmp_path}/study.journal"
    with ray_tools.nodes("127.0.0.2") as cluster:
        words = arguments(recipe, tmp_path, "--ray-address", cluster.address)
        with ray_tools.command(log, *words) as driver:
            assert driver.wait(WAIT_S) == 2, log.read_text()
        text = log.read_text()
        assert "study.db is for one machine, the cluster has 2: " in text and "journal://" in text
        assert not folder.exists()
        with ray_tools.command(log, *words, journal) as driver:
            assert driver.wait(WAIT_S) == 0, log.read_text()
    assert len(list(folder.glob("worker-*.log"))) == 2, "both nodes take part"
    assert rows_of(folder) == local_rows and not (folder / "study.db").exists()
