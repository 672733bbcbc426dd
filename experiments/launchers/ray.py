"""Runs as tasks of a Ray cluster; one whose node dies goes on elsewhere from its checkpoint."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignlab import checkpoint
from alignlab.config import LaunchConfig, RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers.on_node import LOG, Order, seen
from alignlab.experiments.launchers.one_run import RunKey, shown
from alignlab.experiments.launchers.progress import RunsProgress
from alignlab.experiments.launchers.same_code import code_facts
from alignlab.run_folder import RunFolder

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
NOTE_EVERY_S = 60.0
CONNECT_S = 10.0
STOP_S = 30.0  # a run that is told to end finishes what it is writing
MOST_DEATHS = 5
OBJECT_STORE = 128 * 2**20  # nothing but short messages goes through it
GIB = 2**30
RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}


def launch_ray(
    runs: Mapping[RunKey, RunConfig],
    finished: Callable[[RunKey], None],
    *,
    needs: LaunchConfig,
    address: str | None,
) -> None:
    """Trains the runs on the nodes of a cluster and calls `finished` as each ends.

    Their folders must lie on a filesystem that all nodes share.

    Args:
        runs: by variant and seed; their folders exist.
        finished: called in this process.
        needs: what Ray reserves for each run.
        address: `HOST:PORT` or `auto`; None: `RAY_ADDRESS`, else a new cluster on this machine.

    Raises:
        UserError: Ray is not installed, there is no such cluster, a node has other code or does
            not see the folders, or a run cannot be trained.
    """
    if not runs:
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    with _connected(address) as ray:
        _RayRuns(ray, runs, needs, may_grow=address != "local").watch(finished)


class _RayRuns:
    """The tasks of one launch."""

    def __init__(
        self, ray: Any, runs: Mapping[RunKey, RunConfig], needs: LaunchConfig, *, may_grow: bool
    ) -> None:
        self._ray = ray
        self._lost = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.LocalRayletDiedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError,
        )
        self._runs = runs
        self._may_grow = may_grow
        self._folders = {k: RunFolder(Path(run.output) / run.name) for k, run in runs.items()}
        nodes = self._nodes()
        self._request = reservation(needs, nodes)
        self._told = time.monotonic() - NOTE_EVERY_S
        # a lost task is started again here, not by Ray: its deaths are counted
        self._task = ray.remote(max_retries=0, **self._request)(_entry(self._request["num_gpus"]))
        self._threads = needs.cpus or 1
        self._deaths: dict[RunKey, tuple[int, int]] = {}
        self._running: dict[Any, RunKey] = {}
        log.info(
            "Ray: runs to train: %d, nodes: %d; each run takes %s",
            *(len(runs), len(nodes), self._shown_needs()),
        )

    def watch(self, finished: Callable[[RunKey], None]) -> None:
        """Starts all runs and waits for them; whatever ends it, no task is left."""
        progress = RunsProgress(self._runs, self._folders)
        try:
            for key in self._runs:
                self._start(key)
            self._tell_of_room()
            with progress.shown():
                while self._running:
                    ready, _ = self._ray.wait(list(self._running), timeout=LOOK_EVERY_S)
                    for ref in ready:
                        key = self._running.pop(ref)
                        if self._is_done(key, ref):
                            progress.finish(key)
                            finished(key)
                        else:
                            self._start(key)
                    progress.look()
                    self._tell_of_room()
        finally:
            self._cancel()

    def _start(self, key: RunKey) -> None:
        order = Order(
            directory=os.getcwd(),
            folder=str(self._folders[key].path),
            threads=self._threads,
            code=code_facts(),
        )
        self._running[self._task.remote(order)] = key

    def _is_done(self, key: RunKey, ref: Any) -> bool:
        """Whether the run is finished; if not, its worker died and it may be started again."""
        try:
            error = self._ray.get(ref)
        except self._lost as loss:
            self._count_death(key, type(loss).__name__)
            return False
        except self._ray.exceptions.RayTaskError as failure:
            raise failure.cause from failure
        if error is not None:
            raise UserError(f"{shown(key)}: {error}")
        folder = self._folders[key]
        if not seen(folder.result.exists):
            raise UserError(
                f"{shown(key)} is finished, but {folder.result} is not seen from here: "
                "output must lie on a filesystem that all nodes share"
            )
        return True

    def _count_death(self, key: RunKey, kind: str) -> None:
        folder = self._folders[key]
        found = checkpoint.latest(folder.checkpoints)
        step = 0 if found is None else int(found.name.removeprefix("step-"))
        reached, deaths = self._deaths.get(key, (step, 0))
        deaths = deaths + 1 if step == reached else 1
        if deaths == MOST_DEATHS:
            raise UserError(
                f"{shown(key)}: its worker died {deaths} times without a checkpoint after step "
                f"{step} ({kind}): see {folder.path / LOG}, or lower checkpoint.every"
            )
        self._deaths[key] = (step, deaths)
        log.info("%s: its worker died (%s); it goes on from step %d", shown(key), kind, step)

    def _cancel(self) -> None:
        """Interrupts what still runs, and ends it where that does not help."""
        left = list(self._running)
        for force in (False, True):
            if not left:
                return
            for ref in left:
                self._ray.cancel(ref, force=force)
            _, left = self._ray.wait(left, num_returns=len(left), timeout=STOP_S)

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _tell_of_room(self) -> None:
        """Whether runs wait for a node that is not there; a cluster may get it later."""
        if time.monotonic() - self._told < NOTE_EVERY_S:
            return
        self._told = time.monotonic()
        nodes = self._nodes()
        if any(_has_room(node, self._request) for node in nodes):
            return
        if not self._may_grow:
            raise UserError(f"launch: a run needs {self._shown_needs()}: this machine has less")
        log.warning(
            "waiting: no node has what a run needs (%s; nodes: %d)", self._shown_needs(), len(nodes)
        )

    def _shown_needs(self) -> str:
        cpus, gpus, memory = (self._request.get(name, 0) for name in RESOURCES)
        shown = {"CPU": cpus, "GPU": gpus, "GiB": memory / GIB}
        return ", ".join(f"{value:g} {name}" for name, value in shown.items() if value)


def reservation(needs: LaunchConfig, nodes: list[dict[str, float]]) -> dict[str, float]:
    """What Ray reserves for a run, as `ray.remote` takes it.

    Args:
        needs: the recipe's.
        nodes: resources of each node. Where any has a GPU, a run takes one unless told otherwise.
    """
    gpus = needs.gpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    found = {"num_cpus": float(needs.cpus or 1), "num_gpus": gpus}
    if needs.memory_gib is not None:
        found["memory"] = needs.memory_gib * GIB
    return found


def _has_room(node: Mapping[str, float], request: Mapping[str, float]) -> bool:
    return all(node.get(RESOURCES[name], 0) >= value for name, value in request.items())


def _entry(gpus: float) -> Callable[[Order], str | None]:
    """The task. Ray sends it by value, so that a node without alignlab can say so."""

    def train_here(order: Order) -> str | None:
        import os
        import socket

        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides GPUs from no task that takes none
        try:
            from alignlab.errors import UserError
            from alignlab.experiments.launchers.on_node import carry_out
        except ImportError as error:
            return f"node {socket.gethostname()}: {error}: install the same alignlab on every node"
        try:
            carry_out(order)
        except UserError as error:
            return str(error)
        return None

    return train_here


def _check_reachable(address: str) -> None:
    """Ray itself waits many minutes for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {address}: {error.strerror or error}") from None


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Gives the `ray` module, connected; a cluster that was started for it ends with it."""
    try:
        import ray
    except ImportError:
        raise UserError("--launcher ray needs Ray: pip install 'alignlab[ray]'") from None
    if address.startswith("ray://"):
        raise UserError(
            f"{address}: alignlab does not use Ray Client: start the command on a node of the "
            "cluster with --ray-address auto, or submit it with `ray job submit`"
        )
    _check_reachable(address)
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network unless asked
        settings = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    else:
        settings = {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = str(error).strip().split("\n", 1)[0]
        raise UserError(f"Ray at {address}: {line}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
