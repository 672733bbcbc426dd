"""What launchers promise without a cluster: one writer, a machine that fits, clear refusals."""

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, dump_compare, load_compare
from alignlab.experiments.compare.run import compare, probed
from alignlab.experiments.launchers import (
    local,
    make_launcher,
    node,
    same_code,
)
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.ray_cluster import reservation
from alignlab.experiments.launchers.run_progress import steps_done
from alignlab.experiments.launchers.same_code import code_facts, differing_code
from alignlab.recipe import load_run
from alignlab.runs import file_lock, run_folder
from alignlab.runs.run_folder import RunFolder
from processes import forked
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

VARIANTS = "cost: null\nbaseline: none\nseeds: [0]\nvariants:\n  none: {}\n"


@pytest.fixture
def config(recipe_file: Path, tmp_path: Path) -> CompareConfig:
    path = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    return load_compare(path, [f"output={tmp_path}"])


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> RunConfig:
    """A run whose folder exists, as a launcher gets it."""
    config = load_run(recipe_file, [f"output={tmp_path}"])
    RunFolder.create(config)
    return config


@contextmanager
def other_writer(folder: Path) -> Iterator[int]:
    """A process that holds the lock of a run folder; gives its number."""
    told, tell = os.pipe()

    def hold() -> None:
        with run_folder.only_writer(folder, wait=True):
            os.write(tell, b"held")
            time.sleep(300)

    holder = forked(hold)
    os.close(tell)
    try:
        assert os.read(told, 4) == b"held"
        yield holder
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.close(told)


def order_of(run: RunConfig) -> node.Order:
    return {
        "directory": os.getcwd(),
        "folder": str(Path(run.output) / run.name),
        "threads": 1,
        "ranks": 1,
        "code": code_facts(),
    }


def test_a_run_folder_has_one_writer_until_that_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_lock, "NOTE_EVERY_S", 0.1)
    with other_writer(tmp_path) as pid:
        with pytest.raises(UserError, match=rf"trained by another process \(.*process {pid}\)"):
            with run_folder.only_writer(tmp_path, wait=False):
                pass

        def kill_once_waited_for() -> None:
            while f"process {pid}" not in caplog.text:
                time.sleep(0.05)
            killed.set()
            os.kill(pid, signal.SIGKILL)

        killed = threading.Event()
        with caplog.at_level("INFO"):
            threading.Thread(target=kill_once_waited_for, daemon=True).start()
            with run_folder.only_writer(tmp_path, wait=True):
                assert killed.is_set()


def test_a_filesystem_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(UserError, match="without file locks: mount it with flock"):
        with run_folder.only_writer(tmp_path, wait=True):
            pass


def test_a_comparison_refuses_a_run_that_another_process_trains(config: CompareConfig) -> None:
    folder = RunFolder.create(probed(config, "none", 0)).path
    with (
        other_writer(folder),
        pytest.raises(UserError, match=r"pair/none/seed-0 is being trained"),
    ):
        compare(config)
    assert not (folder / "checkpoints").exists()


def test_the_local_launcher_computes_with_the_recipes_threads(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(local, "train", lambda *_, **__: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    before = torch.get_num_threads()
    runs = {("none", 0): config.run("none", 0)}
    RunFolder.create(runs["none", 0])
    for cpus in (3, None):
        make_launcher("local", LaunchConfig(cpus=cpus))(runs, lambda key: None)
    assert seen == [3, before] and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("needs", "gpus", "line"),
    [
        ({"cpus": 4096}, 0, "launch.cpus: a run needs 4096, this machine has"),
        ({"gpus": 0.5}, 0, "launch.gpus: a run needs 0.5, this machine has none"),
        ({"gpus": 0}, 1, "launch.gpus: 0, but a run in this process would use the machine's GPU"),
        ({"memory_gib": 1e6}, 0, "launch.memory_gib: a run needs 1e+06, this machine has"),
    ],
)
def test_a_machine_that_has_less_than_a_run_needs_is_refused(
    needs: dict[str, float], gpus: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError) as info:
        local.check_machine(LaunchConfig.model_validate(needs))
    assert line in str(info.value)


def test_a_machine_that_does_not_tell_its_affinity_has_all_its_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    local.check_machine(LaunchConfig(cpus=3))
    with pytest.raises(UserError, match=r"launch.cpus: a run needs 4, this machine has 3"):
        local.check_machine(LaunchConfig(cpus=4))


def test_a_recipe_says_what_a_run_needs(config: CompareConfig, tmp_path: Path) -> None:
    path = tmp_path / "again.yaml"
    path.write_text(dump_compare(config) + "\n")
    again = load_compare(path, ["launch.cpus=3", "launch.gpus=0.5", "launch.memory_gib=8"])
    assert again.launch == LaunchConfig(cpus=3, gpus=0.5, memory_gib=8)
    assert again.runs == config.runs
    with pytest.raises(UserError, match=r"launch.gpu: unknown key 'gpu'.*gpus"):
        load_compare(path, ["launch.gpu=1"])


def test_ray_reserves_what_a_run_needs() -> None:
    plain, fast = {"CPU": 8.0, "memory": 2e10}, {"CPU": 4.0, "GPU": 2.0, "memory": 2e10}
    assert reservation(LaunchConfig(), [plain]) == {"num_cpus": 1, "num_gpus": 0}
    assert reservation(LaunchConfig(), [plain, fast]) == {"num_cpus": 1, "num_gpus": 1}
    needs = LaunchConfig(cpus=4, gpus=0, memory_gib=2)
    assert reservation(needs, [fast]) == {"num_cpus": 4, "num_gpus": 0, "memory": 2**31}


@pytest.mark.parametrize(
    ("launcher", "address", "line"),
    [
        ("local", "auto", "--ray-address: nothing reads it without --launcher ray"),
        ("ray", "127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: Connection refused"),
        ("ray", "ray://head:10001", "alignlab does not use Ray Client"),
        ("ray", None, "--launcher ray needs Ray: pip install 'alignlab[ray]'"),
    ],
)
def test_what_cannot_launch_is_refused(
    launcher: str,
    address: str | None,
    line: str,
    config: CompareConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None if address is None else sys)
    with pytest.raises(UserError) as info:
        made = make_launcher(launcher, config.launch, ray_address=address)  # type: ignore[arg-type]
        made({("none", 0): config.run("none", 0)}, lambda key: None)
    assert line in str(info.value)


@pytest.mark.parametrize("named_by", ["file", "environment"])
def test_auto_does_not_wait_for_a_cluster_that_has_ended(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "" if named_by == "file" else "127.0.0.1:1")
    latest = tmp_path / "ray" / "ray_current_cluster"
    latest.parent.mkdir()
    latest.write_text("127.0.0.1:1\n" if named_by == "file" else "127.0.0.1:2\n")
    with pytest.raises(UserError, match=r"no Ray cluster at 127\.0\.0\.1:1: Conn"):
        launch = make_launcher("ray", config.launch, ray_address="auto")
        launch({("none", 0): config.run("none", 0)}, lambda key: None)


Spoil = Callable[[node.Order], None]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda order: order["code"].update(files="0"), r"other code .*\(files 0 here, .* there\)"),
        (lambda order: order.update(directory="/nowhere"), "/nowhere: No such file or directory"),
        (lambda order: order.update(folder="/nowhere"), "does not see /nowhere: output must lie"),
    ],
)
def test_a_node_that_cannot_train_alike_says_why(
    spoil: Spoil, line: str, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "VISIBLE_S", 0.0)
    order = order_of(run)
    order["code"] = dict(order["code"])
    spoil(order)
    with pytest.raises(UserError, match=line):
        node.train_run(order)


def test_a_node_trains_in_the_senders_folder_and_leaves_a_log(run: RunConfig) -> None:
    here = os.getcwd()
    try:
        os.chdir(run.output)
        threads = torch.get_num_threads() + 1
        order = order_of(run) | {"folder": run.name, "threads": threads}
        os.chdir("/")
        node.train_run(order)
    finally:
        os.chdir(here)
    folder = RunFolder(Path(run.output) / run.name)
    assert folder.read_result() is not None and steps_done(folder) == run.steps
    facts = json.loads((folder.path / "environment.json").read_text())
    assert facts["threads"] == str(threads)
    assert f"process {os.getpid()} on " in (folder.path / node.LOG).read_text()


def test_code_from_another_commit_may_train_if_its_files_are_the_same() -> None:
    here = code_facts()
    assert differing_code(here, here | {"commit": "another"}) is None
    assert (
        differing_code(here, here | {"torch": "1.0"})
        == f"torch {torch.__version__} here, 1.0 there"
    )


def test_a_changed_file_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_code, "ROOMS", {"alignlab": str(tmp_path)})
    (tmp_path / "assets").mkdir()
    files = [tmp_path / "train.py", tmp_path / "assets" / "weights.safetensors"]
    digests = set()
    for path in (tmp_path / "notes.txt", *files):
        path.write_text("x")
        digests.add(code_facts.__wrapped__()["files"])
    files[0].write_text("y")
    digests.add(code_facts.__wrapped__()["files"])
    assert len(digests) == 4


def test_steps_are_read_from_whole_rows(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert steps_done(folder) == 0
    row = '{"step": %d, "note": "' + "x" * 1000 + '"}\n'
    folder.metrics.write_text("".join(row % step for step in range(200)) + '{"step": 2')
    assert steps_done(folder) == 199
