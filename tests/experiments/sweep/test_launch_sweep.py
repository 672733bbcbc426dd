"""What launchers of sweeps promise without a cluster: who may run trials, and clear refusals."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.errors import UserError
from alignlab.experiments.launchers import local, node
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import num_cpus
from alignlab.experiments.launchers.ray_cluster import MOST_DEATHS, Ended
from alignlab.experiments.launchers.same_code import code_facts
from alignlab.experiments.sweep.config import SweepConfig, dump_sweep, load_sweep
from alignlab.experiments.sweep.launch import make_sweep_launcher
from alignlab.experiments.sweep.lease import machine
from alignlab.experiments.sweep.ray_workers import RaySweep, TrialsOrder, run_trials
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import create_study, join_study
from alignlab.runs.atomic_files import write_text
from alignlab.train import train
from small_recipes import sweep_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeSweep = Callable[..., SweepConfig]

CPUS = num_cpus()

SWEEP = """
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
metric: val/flow
trials: 2
"""


@pytest.fixture
def recipe(recipe_file: Path, tmp_path: Path) -> Path:
    return sweep_recipe(recipe_file, tmp_path / "sweep.yaml", SWEEP)


@pytest.fixture
def make(recipe: Path, tmp_path: Path) -> MakeSweep:
    return lambda *overrides: load_sweep(recipe, [f"output={tmp_path}", *overrides])


@pytest.fixture
def order(make: MakeSweep, tmp_path: Path) -> Iterator[TrialsOrder]:
    """What a node gets of a sweep that has been begun; it may go to another folder meanwhile."""
    here = os.getcwd()
    config = make()
    create_study(config)
    write_text(tmp_path / "sweep" / "recipe.yaml", dump_sweep(config))
    yield {
        "directory": here,
        "folder": str(tmp_path / "sweep"),
        "threads": 1,
        "ranks": 1,
        "code": code_facts(),
        "worker": 2,
        "machine": machine(),
    }
    os.chdir(here)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--ray-address", "auto"], "--ray-address: nothing reads it without --launcher ray"),
        (["--launcher", "ray", "--join"], "--join: the same command with --launcher ray and"),
        (["--launcher", "ray", "--ray-address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["launch.cpus=4096"], "launch.cpus: a run needs 4096, this machine has"),
        (
            [f"launch.cpus={CPUS}", "--workers", "2"],
            f"launch.cpus: 2 workers need {2 * CPUS}, this",
        ),
        (["launch.gpu=1"], "launch.gpu: unknown key 'gpu'"),
    ],
)
def test_what_cannot_run_is_refused_before_there_is_a_study(
    options: list[str],
    line: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)  # so that it need not be installed
    done = CliRunner().invoke(app, ["sweep", str(recipe), f"output={tmp_path}", *options])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {line}") and done.stderr.count("error") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_missing_ray_is_said_to_be_missing(
    make: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray: pip install 'alignlab\[ray\]'"):
        sweep(make(), launcher=make_sweep_launcher("ray"))


@pytest.mark.parametrize(("gpus", "workers"), [(1, 2), (2, 5)])
def test_workers_that_share_more_gpus_than_there_are_are_refused(
    gpus: int, workers: int, make: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a GPU for two workers is fine, also where they take two GPUs in turn."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for launch, fits in ((0.4, gpus == 1), (0.6, False)):
        launcher = make_sweep_launcher("local", workers=workers)
        config = make(f"launch.gpus={launch}")
        if fits:
            with launcher(config):
                continue
        with pytest.raises(UserError, match=rf"launch.gpus: {workers} workers need {launch} each"):
            with launcher(config):
                pass


def test_the_local_worker_computes_with_the_recipes_threads(
    make: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()

    def trained(*arguments: object, **named: object) -> Path:
        seen.append(torch.get_num_threads())
        torch.set_num_threads(before)  # more of them than cores only wait for each other
        try:
            return train(*arguments, **named)  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(seen[-1])

    monkeypatch.setattr(local, "train", trained)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    sweep(make("trials=1", f"launch.cpus={before + 1}"))
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_a_sweep_resumes_with_other_needs(make: MakeSweep, tmp_path: Path) -> None:
    config = make("launch={cpus: 3, gpus: 0.5, memory_gib: 8}")
    assert config.launch == LaunchConfig(cpus=3, gpus=0.5, memory_gib=8)
    (tmp_path / "again.yaml").write_text(dump_sweep(config))
    assert load_sweep(tmp_path / "again.yaml") == config
    create_study(config)
    join_study(make())


def test_a_node_runs_what_waits_and_leaves_a_log(order: TrialsOrder, make: MakeSweep) -> None:
    study = join_study(make())
    held = study.claim()
    assert held is not None
    threads = torch.get_num_threads()
    run_trials(order | {"directory": "/", "threads": threads + 1})
    states = [trial.state for trial in study.trials()]
    assert states == [TrialState.RUNNING, TrialState.COMPLETE], "another's trial is left alone"
    log = (Path(order["folder"]) / "worker-2.log").read_text()
    assert f"process {os.getpid()} on " in log and "trial 1: objectives.ra.weight=" in log
    assert torch.get_num_threads() == threads


def elsewhere(order: TrialsOrder) -> None:
    order["machine"] = "another"


def other_code(order: TrialsOrder) -> None:
    order["code"] = order["code"] | {"files": "0"}


def no_folder(order: TrialsOrder) -> None:
    order["folder"] = "/nowhere"


def unseen_journal(order: TrialsOrder) -> None:
    recipe = Path(order["folder"]) / "recipe.yaml"
    url = f"journal://{order['folder']}/unseen/study.log"
    recipe.write_text(recipe.read_text() + f"storage: {url}\n")
    order["machine"] = None


def silent_server(order: TrialsOrder) -> None:
    recipe = Path(order["folder"]) / "recipe.yaml"
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/db"
    recipe.write_text(recipe.read_text() + f"storage: {url}\n")
    order["machine"] = None


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (elsewhere, r"cannot use sqlite:///.*study.db: a sweep on several machines needs"),
        (other_code, r"would train with other code .*files 0 here"),
        (no_folder, r"does not see /nowhere: output must lie on a filesystem"),
        (unseen_journal, r"cannot use /.*/unseen/study.log: a sweep on several machines needs"),
        (silent_server, r"storage: postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/db"),
    ],
)
def test_a_node_that_cannot_take_part_says_why(
    spoil: Callable[[TrialsOrder], None],
    line: str,
    order: TrialsOrder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node, "VISIBLE_S", 0.0)
    spoil(order)
    with pytest.raises(UserError, match=rf"^node .*{line}") as info:
        run_trials(order)
    assert "secret" not in str(info.value) and "\n" not in str(info.value)


class DeadlyTasks:
    """Stands for a cluster each of whose workers dies, one of three after it finished a trial."""

    threads = 1

    def __init__(self, finish: Callable[[], None], every: int | None) -> None:
        self.running: set[int] = set()
        self.started = 0
        self._finish, self._every = finish, every

    def start(self, key: int, order: TrialsOrder) -> None:
        self.running.add(key)
        self.started += 1

    def ended(self, seconds: float) -> Iterator[Ended[int]]:
        for key in sorted(self.running):
            self.running.remove(key)
            if self._every is not None and self.started % self._every == 0:
                self._finish()
            yield Ended(key, None, "WorkerCrashedError")

    def shown_needs(self) -> str:
        return "1 CPU"

    def room(self) -> int:
        return 1

    def warn_without_room(self) -> None:
        pass

    def cancel(self) -> None:
        assert not self.running


@pytest.mark.parametrize(("every", "started"), [(None, MOST_DEATHS), (3, 30)])
def test_workers_that_die_are_started_again_unless_nothing_gets_further(
    every: int | None, started: int, make: MakeSweep
) -> None:
    study = create_study(make("trials=10"))

    def finish() -> None:
        claimed = study.claim()
        assert claimed is not None
        study.study.tell(claimed[0], 1.0)

    tasks = DeadlyTasks(finish, every)
    watched = RaySweep(study, tasks, workers=None)  # type: ignore[arg-type]
    if every is None:
        with pytest.raises(
            ChildProcessError, match=r"worker 1 died 5 times while no trial got further"
        ):
            watched.watch()
    else:
        watched.watch()
        assert study.is_finished()
    assert tasks.started == started
