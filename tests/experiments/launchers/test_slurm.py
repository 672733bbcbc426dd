"""Runs as SLURM jobs, through submitit: what is asked of SLURM, and a job that is preempted."""

import os
import pickle
import signal
import stat
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.compare.run import compare
from alignlab.experiments.launchers import make_launcher, slurm
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.node import order_for
from alignlab.experiments.launchers.ray_cluster import MOST_DEATHS
from alignlab.runs.checkpoint_folders import step_folders
from processes import descendants
from run_contents import timeless_metrics
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

VARIANTS = """
cost: null
baseline: none
seeds: [0, 1]
launch:
  {cpus: 3, gpus: 2, memory_gib: 40, slurm: {partition: long, hours: 2, options: {exclude: node7}}}
variants:
  none: {}
"""
GPUS = "gpus: 2, memory_gib: 40"
# Every job ends at once and leaves no result, as if its node were lost.
PROGRAMS = {
    "srun": "exit 0",
    "sbatch": 'cp "$1" "$FAKE_SLURM/script"; echo "Submitted batch job 12"',
    "sacct": 'echo "JobID|State|NodeList"; echo "12_0|NODE_FAIL|n"; echo "12_1|NODE_FAIL|n"',
    "scancel": 'echo "$@" >> "$FAKE_SLURM/cancelled"',
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs named as SLURM's, first on the path; gives the folder where they write."""
    for name, line in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    return tmp_path


@pytest.fixture
def config(recipe_file: Path, tmp_path: Path) -> CompareConfig:
    path = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    return load_compare(path, [f"output={tmp_path / 'runs'}", "optim.batch_size=4"])


def test_jobs_are_an_array_that_asks_for_what_the_recipe_says_and_lost_ones_are_counted(
    config: CompareConfig, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    with pytest.raises(ChildProcessError, match=r"its job was lost 5 times without a checkpoint"):
        compare(config, launcher=make_launcher("slurm", config.launch, workers=1))
    script = (cluster / "script").read_text()
    asked = {line.split(" ", 1)[1] for line in script.splitlines() if line.startswith("#SBATCH")}
    for option in (
        "--partition=long",
        "--exclude=node7",
        "--cpus-per-task=3",
        "--gpus-per-node=2",
        "--mem=40GB",
        "--time=120",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--job-name=pair",
        f"--signal=USR2@{slurm.SIGNAL_S}",
    ):
        assert option in asked, f"{option} not in {sorted(asked)}"
    assert any(option.startswith("--array=0-") and option.endswith("%1") for option in asked)
    assert "--open-mode=append" in asked  # a requeued job adds to its log


def test_a_machine_without_slurm_is_refused_before_anything_is_trained(
    config: CompareConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--launcher slurm: no sbatch here: start the command on"):
        compare(config, launcher=make_launcher("slurm", config.launch))
    assert not list(tmp_path.glob("runs/**/checkpoints"))


def test_submitit_that_is_missing_is_named_with_its_extra(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'alignlab\[slurm\]'"):
        compare(config, launcher=make_launcher("slurm", config.launch))


def test_a_job_that_is_requeued_again_and_again_without_a_checkpoint_is_given_up(
    tmp_path: Path,
) -> None:
    job = slurm.RunJob(order_for(tmp_path, 1))
    for _ in range(MOST_DEATHS - 1):
        assert job.checkpoint() is not None
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    again = pickle.loads(pickle.dumps(job))  # as submitit requeues it
    for _ in range(MOST_DEATHS - 1):
        assert again.checkpoint() is not None
    assert again.checkpoint() is None


def test_a_time_limit_leaves_time_for_a_step_before_the_signal() -> None:
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.25"):
        LaunchConfig.model_validate({"slurm": {"hours": 0.1}})


def test_a_share_of_a_gpu_is_not_asked_of_slurm() -> None:
    with pytest.raises(ValidationError, match="SLURM gives a job whole GPUs"):
        LaunchConfig.model_validate({"gpus": 0.5, "slurm": {"partition": "long"}})


def test_a_sweep_is_not_sent_to_slurm(recipe_file: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", str(recipe_file), "--launcher", "slurm"])
    assert result.exit_code == 2 and "slurm" in result.output


class Preempting:
    """Stands for submitit's `LocalJob.done`; preempts the first job once its run trains."""

    def __init__(self, rows: Path) -> None:
        self.rows = rows
        self.preempted = False

    def __call__(self, job: Any) -> bool:
        if not self.preempted and self.rows.exists() and self.rows.stat().st_size:
            self.preempted = True
            for pid in descendants(job._process.pid):  # SLURM signals all processes of a step
                os.kill(pid, signal.SIGUSR2)
        return bool(job.get_info()["jobState"] != "RUNNING")


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_its_run_ends_as_one_that_was_not(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = VARIANTS.replace("[0, 1]", "[0]").replace(GPUS, "gpus: 0, ranks: 2")
    path = comparison_recipe(recipe_file, tmp_path / "pair.yaml", variants)
    settings = ["steps=60", "optim.batch_size=4", "optim.accumulate=2", "checkpoint.every=1000"]
    found: list[Any] = []
    for output in ("whole", "preempted"):
        config = load_compare(path, [*settings, f"output={tmp_path / output}"])
        run = tmp_path / output / "pair" / "none" / "seed-0"
        preempting = Preempting(run / "metrics.jsonl" if output == "preempted" else run / "none")
        monkeypatch.setattr("submitit.local.local.LocalJob.done", lambda job, p=preempting: p(job))
        compare(config, launcher=partial(slurm.launch_slurm, needs=config.launch, cluster="local"))
        assert preempting.preempted == (output == "preempted")
        found.append(timeless_metrics(run))
        log = (run / "worker.log").read_text()
        assert log.count("process ") == (2 if preempting.preempted else 1), log
        assert step_folders(run / "checkpoints")[-1].name == "step-000060"
    assert found[0] == found[1]
