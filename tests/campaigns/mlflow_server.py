"""A training whose MLflow server dies, hangs, returns or was never there; by hand, minutes.

    python tests/campaigns/mlflow_server.py [--steps 60] [--rounds 20] [--only hung,killed]

A real `mlflow server` runs on this machine. For each case a run is trained in a process that is
forked from one that has imported everything, and the server is dealt with when so many rows are
written. The table says how long the training took, how many points (a metric at a step) of its
`metrics.jsonl` MLflow lacks and has twice at its end, and after `alignlab track`, with the server
up again. At last, four runs at a time start in a new folder, and share its new database.
"""

import argparse
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from mlflow import MlflowClient

from alignlab.runs.metric_rows import read_rows
from alignlab.tracking.connection import Connection
from alignlab.tracking.names import tracked_name

RECIPE = """
name: run
model: {path: assets/tiny-wan}
data: {name: shapes, frames: 5, size: [48, 48], references: [2, 3], train_clips: 6, val_clips: 4}
teachers:
  dino: {family: dinov2, path: assets/tiny-dino, feature: post_norm}
objectives: {ra: {name: refalign, teacher: dino, blocks: [0, 2]}}
optim: {lr: 1e-3, batch_size: 2}
eval: {clips: 1, batch_size: 8, sample_clips: 0}
tracking: {log_every: 1}
checkpoint: {every: 5, keep: 1}
"""
ROWS = 50  # after which something happens to the server
AWAY_S = 5.0
WARM = (
    "alignlab.cli",
    "alignlab.train",
    "alignlab.experiments.send",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.dinov2.modeling_dinov2",
)


class Server:
    """`mlflow server` on this machine, with a database that survives it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts"), "--workers", "1"]
        with (self._folder / "server.log").open("ab") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True
            )
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"mlflow server does not start, see {self._folder / 'server.log'}")

    def send(self, number: int) -> None:
        """Sends a signal to all its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Starts it again after some seconds."""
        self.kill()
        time.sleep(AWAY_S)
        self.start()


@dataclass
class Seen:
    """What was seen of a case.

    Args:
        case: its name.
        seconds: that the training took, from its start to its exit.
        waited: of these, spent with MLflow (of its resumption, where the run was killed).
        exit_code: of the training, or of `alignlab track` where that failed.
        longest_gap: seconds between two rows.
        points: in metrics.jsonl.
        at_the_end: points that MLflow lacks and that it has twice, at the end of the training.
        after_track: the same after `alignlab track`.
        runs: in MLflow.
        open: of these, not FINISHED.
    """

    case: str
    seconds: float
    waited: float
    exit_code: int
    longest_gap: float
    points: int = 0
    at_the_end: tuple[int, int] = (0, 0)
    after_track: tuple[int, int] = (0, 0)
    runs: int = 0
    open: int = 0


def in_child(
    arguments: list[str], errors: Path, then: Callable[[int], None] = lambda child: None
) -> tuple[int, float, float]:
    """Runs a command of alignlab in a forked child.

    Args:
        arguments: of the command line.
        errors: where its lines go.
        then: is done meanwhile, with the child's process id.

    Returns:
        Its exit code, negative for a signal, how many seconds it ran, and how many of them with
        MLflow.
    """
    begin, ended = time.time(), errors.with_name("ended")
    ended.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 70
        waited = count_waiting()
        try:
            with errors.open("ab") as file:
                os.dup2(file.fileno(), 2)
                os.dup2(file.fileno(), 1)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
            sys.argv = ["alignlab", *arguments]
            importlib.import_module("alignlab.cli").main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            ended.write_text(f"{time.time()} {waited[0]}")
            os._exit(status)
    then(child)
    _, status = os.waitpid(child, 0)
    until, waited_s = time.time(), 0.0
    if ended.exists():
        until, waited_s = map(float, ended.read_text().split())
    return os.waitstatus_to_exitcode(status), until - begin, waited_s


def count_waiting() -> list[float]:
    """Counts, from now on in this process, the seconds that are spent with MLflow."""
    waited, attempt = [0.0], Connection.attempt

    def counted(original: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            begin = time.monotonic()
            try:
                return original(*args, **settings)
            finally:
                waited[0] += time.monotonic() - begin

        return call

    Connection.attempt = counted(attempt)  # type: ignore[method-assign]
    return waited


def wait_for_rows(metrics: Path) -> None:
    """Waits until a run has written `ROWS` rows."""
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < ROWS:
        time.sleep(0.02)


def compared(client: MlflowClient, metrics: Path) -> tuple[int, int]:
    """How many points of a run's log MLflow lacks, and how many it has too many."""
    written = Counter(
        (tracked_name(name), int(row["step"]))
        for row in read_rows(metrics)
        for name in row.keys() - {"step", "time"}
    )
    sent: Counter[tuple[str, int]] = Counter()
    for run in runs_of(client):
        for name in run.data.metrics:
            sent.update((m.key, m.step) for m in client.get_metric_history(run.info.run_id, name))
    return sum((written - sent).values()), sum((sent - written).values())


def runs_of(client: MlflowClient) -> list[Any]:
    """All runs of all experiments."""
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def watch(case: str, folder: Path, steps: int) -> Seen:
    """Trains with a server that is dealt with as the case says."""
    server, output = Server(folder), folder / "out"
    metrics, errors = output / "run" / "metrics.jsonl", folder / "errors.txt"
    recipe = folder / "run.yaml"
    recipe.write_text(RECIPE)
    place = "none" if case == "no MLflow" else server.url
    command = ["train", str(recipe), f"steps={steps}", f"output={output}"]
    command.append(f"tracking.mlflow={place}")
    if case not in ("no MLflow", "down from the start"):
        server.start()
    acts: dict[str, Callable[[], None]] = {
        "killed, back after 5 s": server.restart,
        "killed for good": server.kill,
        "hung for good": lambda: server.send(signal.SIGSTOP),
    }

    def act(child: int) -> None:
        if case in acts:
            wait_for_rows(metrics)
            acts[case]()

    def kill(child: int) -> None:
        wait_for_rows(metrics)
        os.kill(child, signal.SIGKILL)

    try:
        earlier = 0.0
        if case == "run killed, resumed":
            earlier = in_child(command, errors, kill)[1]
        code, seconds, waited = in_child(command, errors, act)
        times = [row["time"] for row in read_rows(metrics)][1:]
        seen = Seen(case, earlier + seconds, waited, code, max(map(sub, times[1:], times)))
        if case == "no MLflow":
            return seen
        if case == "hung for good":
            server.send(signal.SIGCONT)
            time.sleep(2)
        elif case in ("killed for good", "down from the start"):
            server.start()
        client = MlflowClient(server.url)
        seen.at_the_end = compared(client, metrics)
        seen.exit_code = seen.exit_code or in_child(["track", str(output / "run")], errors)[0]
        seen.points = sum(len(row) - 2 for row in read_rows(metrics))
        runs = runs_of(client)
        seen.runs, seen.open = len(runs), sum(run.info.status != "FINISHED" for run in runs)
        seen.after_track = compared(client, metrics)
        return seen
    finally:
        server.kill()
        for line in errors.read_text().splitlines():
            if "MLflow" in line or "Error" in line:
                print(f"    {line.strip()}")


def starts_at_once(rounds: int) -> str:
    """Four runs at a time log into the new database of a new folder; how many rounds failed."""
    from alignlab.recipe import load_run
    from alignlab.runs.run_folder import RunFolder
    from alignlab.tracking import Tracker
    from alignlab.tracking.mlflow_run import ENDED, read_state

    failed, lost, begin = 0, 0, time.monotonic()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            recipe, children = Path(folder, "run.yaml"), []
            recipe.write_text(f"{RECIPE}steps: 9\n")
            for index in range(4):
                children.append(os.fork())
                if children[-1] == 0:
                    status = 70
                    try:
                        name = f"name=together/{index}"  # of one experiment, new as well
                        config = load_run(recipe, [f"output={folder}", name])
                        place = RunFolder.create(config)
                        with Tracker(place, config, start=0, environment={}) as tracker:
                            for step in range(10):
                                tracker.log(step, {"loss/total": 1.0 / (1 + step)})
                        status = 0 if ENDED in read_state(place.path) else 1
                    finally:
                        os._exit(status)
            failed += any([os.waitpid(child, 0)[1] for child in children])
            client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
            runs = runs_of(client)
            histories = [client.get_metric_history(r.info.run_id, "loss/total") for r in runs]
            lost += 40 - sum(map(len, histories))
            client._tracking_client.store.engine.dispose()  # the folder goes away
    seconds = (time.monotonic() - begin) / max(1, rounds)
    return (
        f"{rounds} rounds of 4 starts at once: {failed} failed, {lost} of {40 * rounds} points "
        f"lost, {seconds:.1f} s a round"
    )


CASES = (
    "no MLflow",
    "up",
    "killed, back after 5 s",
    "killed for good",
    "down from the start",
    "hung for good",
    "run killed, resumed",
)


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="words of the cases to run, with commas between")
    options = parser.parse_args()
    words = options.only.split(",") if options.only else [""]
    torch.set_num_threads(1)
    for module in WARM:
        importlib.import_module(module)
    print(
        "case                     seconds  with MLflow  longest gap  exit  points  "
        "lost/twice at the end  after track  runs/open"
    )
    for case in CASES:
        if any(word in case for word in words):
            with tempfile.TemporaryDirectory() as folder:
                seen = watch(case, Path(folder), options.steps)
            print(
                f"{seen.case:24} {seen.seconds:7.1f}  {seen.waited:11.1f}  "
                f"{seen.longest_gap:11.1f}  "
                f"{seen.exit_code:4}  {seen.points:6}  {seen.at_the_end!s:>21}  "
                f"{seen.after_track!s:>11}  {seen.runs:4}/{seen.open}",
                flush=True,
            )
    print(starts_at_once(options.rounds))


main()
