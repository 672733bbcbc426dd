"""Runs of a comparison that several ranks train: as one process trains them, and ended in order."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from pydantic import ValidationError

from alignlab import interruption
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.run import compare, probed
from alignlab.experiments.launchers import several_ranks
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import check_machine, train_one
from alignlab.experiments.launchers.local_workers import devices_of
from alignlab.experiments.launchers.several_ranks import LostRankError, at_fault, train_ranks
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.worker import check as check_sweep
from alignlab.recipe import load_run
from alignlab.runs.checkpoint_folders import newest_step
from alignlab.runs.file_lock import WRITER, HeldError, file_lock
from alignlab.runs.run_folder import RunFolder
from forked_command import ForkedProcess
from processes import is_running
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

STEPS = 3
VARIANTS = """
cost: null
baseline: none
seeds: [0]
launch: {gpus: 0, ranks: 2}
variants:
  none: {}
  ra: {objectives: {ra: {name: refalign, teacher: dino, blocks: [0]}}}
"""


class StoppedError(Exception):
    """Raised by who is told of an evaluation."""


def test_two_ranks_train_a_comparison_as_one_process_does_and_resume_what_was_ended(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several_ranks, "started", ForkedProcess)
    path = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    settings = [f"steps={STEPS}", "eval.every=1", "optim.batch_size=4", "optim.accumulate=2"]
    two = load_compare(path, [*settings, f"output={tmp_path / 'two'}"])
    one = load_compare(path, [*settings, f"output={tmp_path / 'one'}", "launch.ranks=1"])
    told: list[int] = []

    def stop_at_first(step: int, metrics: Mapping[str, float]) -> None:
        told.append(step)
        assert "val/flow" in metrics
        raise StoppedError

    run = probed(two, "ra", 0)
    with pytest.raises(StoppedError):
        train_one(run, {}, two.launch, wait=False, on_evaluation=stop_at_first)
    folder = RunFolder(tmp_path / "two" / "pair" / "ra" / "seed-0")
    ended_at = newest_step(folder.checkpoints)
    assert told == [1] and 1 <= ended_at <= STEPS
    compare(two)
    compare(one)
    found = []
    for config in (one, two):
        results = json.loads((Path(config.output) / "pair" / "comparison.json").read_text())
        found.append({run["variant"]: run["metrics"] for run in results["results"]})
        assert results["environment"]["processes"] == str(config.launch.num_ranks)
    alone, together = found
    assert set(alone) == {"none", "ra"}
    for variant, metrics in alone.items():
        assert together[variant]["val/flow"] == pytest.approx(metrics["val/flow"], rel=1e-5)


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> RunConfig:
    return load_run(recipe_file, [f"output={tmp_path}"])


Rank = Callable[[int], str]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rank], None]:
    """Puts other programs in place of the ranks; each is given by its number."""

    def replace(program: Rank) -> None:
        begin = several_ranks.started

        def start(command: object, environment: Mapping[str, str], log: Path) -> object:
            source = program(int(environment["RANK"]))
            return begin([sys.executable, "-S", "-c", source], environment, log)

        monkeypatch.setattr(several_ranks, "started", start)

    monkeypatch.setattr(several_ranks, "LAST_S", 0.5)
    monkeypatch.setattr(several_ranks, "LOOK_EVERY_S", 0.05)
    return replace


def says(line: str, code: int) -> str:
    return f"import sys; sys.stderr.write({line!r} + chr(10)); sys.exit({code})"


KILLED = r"^rank 1: killed by SIGKILL \(see .*rank-1.log\): the same command resumes"
LOST = "another rank has stopped, its own message says why (Connection)"
GONE = says(f"error: {LOST}", 2)
NO = says("error (rank 1 of 2): optim.lr: no", 2)
SIGNALLED = "import os, signal, time; os.kill(os.getpid(), signal.{}); time.sleep(60)"


@pytest.mark.parametrize(
    ("programs", "error", "line"),
    [
        ([GONE, NO], UserError, r"^rank 1: optim\.lr: no \(see .*-1"),
        ([GONE, SIGNALLED.format("SIGKILL")], LostRankError, KILLED),
        ([says("Boom", 1), "import time; time.sleep(600)"], ChildProcessError, "^rank 0: Boom"),
    ],
)
def test_the_rank_at_fault_is_named_and_no_other_is_left(
    programs: list[str],
    error: type[Exception],
    line: str,
    run: RunConfig,
    faked: Callable[[Rank], None],
) -> None:
    faked(lambda rank: programs[rank])
    begin = time.monotonic()
    with pytest.raises(error, match=line):
        train_ranks(run, 2, wait=False)
    assert time.monotonic() - begin < 500  # nobody waits for a rank that hangs


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([(1, f"error: {LOST}"), (-9, "")], 1),
        ([(143, "interrupted (SIGTERM)"), (1, "error: CUDA out of memory")], 1),
        ([(-15, ""), (1, "error: CUDA out of memory")], 1),
        ([(143, "interrupted (SIGTERM)"), (2, "error: optim.lr: no")], 1),
        ([(2, f"error: {LOST}"), (143, "interrupted (SIGTERM)")], 1),
        ([(0, ""), (2, f"error: {LOST}"), (1, f"error: {LOST}")], 1),
    ],
)
def test_who_lost_another_or_was_told_to_end_is_not_blamed(
    ends: list[tuple[int, str]], rank: int
) -> None:
    assert at_fault([code for code, _ in ends], [line for _, line in ends]) == rank


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_asks_its_ranks_to_end_and_waits_for_them(
    number: signal.Signals, run: RunConfig, faked: Callable[[Rank], None], tmp_path: Path
) -> None:
    """Both get a SIGTERM, on which a training writes a checkpoint, whatever the command got."""
    begun, ended = ([tmp_path / f"{what}-{rank}" for rank in range(2)] for what in ("pid", "end"))

    def program(rank: int) -> str:
        return (
            "import os, signal, sys, time\n"
            "def end(number, frame):\n"
            f"    time.sleep({0.3 * rank}); open({str(ended[rank])!r}, 'w').write(str(number))\n"
            "    sys.exit(143)\n"
            "signal.signal(signal.SIGTERM, end)\n"
            f"open({str(begun[rank])!r} + '.part', 'w').write(str(os.getpid()))\n"
            f"os.rename({str(begun[rank])!r} + '.part', {str(begun[rank])!r})\n"
            "time.sleep(60)"
        )

    def send() -> None:
        while not all(path.exists() for path in begun):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    faked(program)
    sender = threading.Thread(target=send)
    sender.start()
    with interruption.handled(), pytest.raises(interruption.Interrupted) as stop:
        train_ranks(run, 2, wait=False)
    sender.join()
    assert stop.value.number == number
    assert [path.read_text() for path in ended] == [str(int(signal.SIGTERM))] * 2
    assert not any(is_running(int(path.read_text())) for path in begun)


def test_a_rank_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    rank = (
        "import os, signal, time; from alignlab.parent_process import end_with_parent; "
        "end_with_parent(signal.SIGTERM, os.getppid()); print(flush=True); time.sleep(600)"
    )
    launcher = (
        "import subprocess, sys; "
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE); "
        "rank.stdout.readline(); print(rank.pid, flush=True); rank.wait()"
    )
    command = [sys.executable, "-c", launcher]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.kill()
    end = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)


def test_ranks_get_what_torchrun_gives_them_and_share_the_cores(
    run: RunConfig, faked: Callable[[Rank], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS ALIGNLAB_LAUNCHER".split()
    faked(lambda rank: f"import os; print([os.environ[n] for n in {names}], os.getsid(0))")
    train_ranks(run, 2, wait=False, cpus=6)
    folder = RunFolder(Path(run.output) / run.name).path
    for rank in range(2):
        said = (folder / f"rank-{rank}.log").read_text()
        assert said.startswith(f"['{rank}', '{rank}', '2', '127.0.0.1', '3', '{os.getpid()}']")
        assert int(said.split()[-1]) != os.getsid(0)  # Ctrl-C reaches the command alone


def test_a_run_that_another_command_trains_is_not_started(
    run: RunConfig, faked: Callable[[Rank], None]
) -> None:
    faked(lambda rank: says("error: started", 2))
    folder = RunFolder.create(run).path
    for name in (several_ranks.LOCK, ".writer.lock"):
        with file_lock(folder / name, waiting=lambda: "waiting"):
            with pytest.raises(HeldError, match="is being trained by another command"):
                train_ranks(run, 2, wait=False)


def test_ranks_that_a_lost_launcher_has_left_are_waited_for(
    run: RunConfig, faked: Callable[[Rank], None]
) -> None:
    folder = RunFolder.create(run).path
    ended = threading.Event()
    faked(lambda rank: "" if ended.is_set() else says("error: begun beside them", 2))

    def end() -> None:
        ended.set()
        left.release()

    left = FileLock(folder / WRITER, thread_local=False)
    left.acquire()
    threading.Timer(1.0, end).start()
    train_ranks(run, 2, wait=True)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"gpus": 1.5}, "1.5 must be a whole number, or at most 1"),
        ({"gpus": 2, "ranks": 4}, "ranks: 4, but gpus: 2: each rank has a GPU of its own"),
        ({"gpus": 0.5, "ranks": 2}, "ranks: 2, but gpus: 0.5"),
    ],
)
def test_ranks_and_gpus_that_do_not_fit_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        LaunchConfig(**settings)


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_is_made(
    recipe_file: Path, tmp_path: Path
) -> None:
    path = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    config = load_compare(
        path, [f"output={tmp_path / 'runs'}", "optim.batch_size=3", "optim.accumulate=1"]
    )
    with pytest.raises(UserError, match=r"2 ranks, but optim\.batch_size 3 is no multiple"):
        compare(config)
    assert not (tmp_path / "runs").exists()


def test_what_compares_samples_is_refused_before_anything_is_made(
    recipe_file: Path, tmp_path: Path
) -> None:
    coupled = "variants.ra.objectives.ra.negatives=batch"
    output = f"output={tmp_path / 'runs'}"
    path = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    with pytest.raises(UserError, match=r"^objectives\.ra: .* which 2 ranks would share"):
        compare(load_compare(path, [output, "optim.batch_size=2", coupled]))
    space = "space.objectives.ra.weight={kind: float, low: 1, high: 2}"
    search = (space, "metric=val/flow", "trials=1", "launch={gpus: 0, ranks: 2}")
    sweep = load_sweep(recipe_file, [output, "objectives.ra.negatives=batch", *search])
    with pytest.raises(UserError, match=r"^objectives\.ra: .* which 2 ranks would share"):
        check_sweep(sweep)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("needs", "gpus", "runs", "fits"),
    [(4, 8, 2, True), (4, 7, 2, False), (8, 4, 1, False), (0.5, 1, 2, True), (0.5, 1, 3, False)],
)
def test_a_machine_holds_so_many_runs_of_several_gpus(
    needs: float, gpus: int, runs: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config = LaunchConfig(gpus=needs)
    if fits:
        check_machine(config, runs=runs)
        return
    with pytest.raises(UserError, match=rf"launch\.gpus: .* this machine has {gpus}"):
        check_machine(config, runs=runs)


def test_ranks_without_a_word_of_gpus_each_need_one_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    check_machine(LaunchConfig(ranks=3))
    with pytest.raises(UserError, match=r"launch\.ranks: 2 workers need 4 GPUs, .* machine has 3"):
        check_machine(LaunchConfig(ranks=2), runs=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_machine(LaunchConfig(ranks=2))


def test_workers_take_groups_of_gpus_in_turn() -> None:
    found = [devices_of(i, "4,5,6,7", 2).get("CUDA_VISIBLE_DEVICES") for i in range(3)]
    assert found == ["4,5", "6,7", "4,5"]
    assert devices_of(0, "4,5", 2) == {} and devices_of(1, "4,5", 1) == {
        "CUDA_VISIBLE_DEVICES": "5"
    }
