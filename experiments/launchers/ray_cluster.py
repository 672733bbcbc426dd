"""A Ray cluster, and tasks on its nodes that are watched until they end."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from alignlab import interruption
from alignlab.errors import UserError, first_line
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.node import Order
from alignlab.experiments.launchers.several_ranks import LostRankError
from alignlab.units import GIB, MIB

log = logging.getLogger(__name__)

MOST_DEATHS = 5  # of a task that gets no further
NOTE_EVERY_S = 60.0
CONNECT_S = 10.0
STOP_S = 120.0  # a task that is told to end finishes its step and checkpoint, or its clip
OBJECT_STORE = 128 * MIB  # nothing but short messages goes through it
RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}

Key = TypeVar("Key")


@dataclass(frozen=True)
class RayCluster:
    """A cluster that this process is connected to.

    Args:
        ray: the `ray` module.
        may_grow: whether nodes may come; none do to a cluster that was started for this command.
    """

    ray: Any
    may_grow: bool

    def nodes(self) -> list[dict[str, float]]:
        """Resources of each node that lives."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def machines(self) -> set[str]:
        """Network addresses of the nodes that live."""
        return {node["NodeManagerAddress"] for node in self.ray.nodes() if node["Alive"]}


class Ended(NamedTuple, Generic[Key]):
    """A task that has ended.

    Args:
        key: which one.
        error: the line of the UserError that it ended with.
        loss: how its process was lost; None where the task ended by itself.
        value: what it returned.
    """

    key: Key
    error: str | None
    loss: str | None
    value: Any = None


class Deaths(Generic[Key]):
    """How often the process of a task died since the task last got further.

    The owner of a lost task starts it again, not Ray's `max_retries` (tried with Ray 2.60). Ray
    counts all deaths: with `max_retries=4`, a task that gets further each time, on nodes that come
    and go, is given up at its fifth start; with -1, one that never gets further starts for ever.
    Nor does Ray tell the caller of a death.
    """

    def __init__(self) -> None:
        self._counts: dict[Key, tuple[object, int]] = {}

    def count(self, key: Key, progress: object) -> int:
        """Counts one more; `progress` is anything that changes as the task gets further."""
        before, deaths = self._counts.get(key, (progress, 0))
        deaths = deaths + 1 if progress == before else 1
        self._counts[key] = (progress, deaths)
        return deaths


class RayTasks(Generic[Key]):
    """The tasks of one command, each with its own key and the same resources.

    Args:
        cluster: where they run.
        needs: what Ray reserves for each.
        job: a function of a module, which the node imports.
    """

    def __init__(self, cluster: RayCluster, needs: LaunchConfig, job: Callable[[Any], Any]) -> None:
        self._cluster = cluster
        self._ray = cluster.ray
        errors = cluster.ray.exceptions
        self._lost = (  # of a task's process or node; what cannot heal is raised
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.LocalRayletDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        )
        self._request = reservation(needs, cluster.nodes())
        self.threads = needs.cpus or 1
        self.ranks = needs.num_ranks
        entry = _entry(job.__module__, job.__name__, self._request["num_gpus"])
        self._task = cluster.ray.remote(max_retries=0, **self._request)(entry)
        self._running: dict[Any, Key] = {}
        self._warned = time.monotonic() - NOTE_EVERY_S

    @property
    def running(self) -> set[Key]:
        """Tasks that have not ended, also those that wait for a node."""
        return set(self._running.values())

    def start(self, key: Key, order: Order) -> None:
        """Runs a task as soon as a node has room for it."""
        self._running[self._task.remote(order)] = key

    def ended(self, seconds: float) -> Iterator[Ended[Key]]:
        """Tasks that end within a time; it returns at once when any has.

        Raises:
            BaseException: what a task raised that is no UserError.
        """
        if not self._running:
            time.sleep(seconds)
            return
        ready, _ = self._ray.wait(list(self._running), timeout=seconds)
        for ref in ready:
            key = self._running.pop(ref)
            try:
                error, value = self._ray.get(ref)
                yield Ended(key, error, None, value)
            except self._lost as loss:
                yield Ended(key, None, type(loss).__name__)
            except self._ray.exceptions.RayTaskError as failure:
                if not isinstance(failure.cause, LostRankError):
                    raise failure.cause from failure
                yield Ended(key, None, failure.cause.loss)

    def cancel(self) -> None:
        """Interrupts what still runs, and ends it where that does not help."""
        left = list(self._running)
        if left:
            log.info(
                "tasks end, a training with a checkpoint, a build after the clip it is at: %d",
                len(left),
            )
        for force in (False, True):
            if not left:
                return
            for ref in left:
                self._ray.cancel(ref, force=force)
            _, left = self._ray.wait(left, num_returns=len(left), timeout=STOP_S)

    def room(self) -> int:
        """How many tasks the nodes hold at once while they do nothing else."""
        return sum(_room(node, self._request) for node in self._cluster.nodes())

    def warn_without_room(self) -> None:
        """A line each minute while no node could ever hold a task: a cluster may get one later.

        Raises:
            UserError: this cluster gets no more nodes.
        """
        if time.monotonic() - self._warned < NOTE_EVERY_S:
            return
        self._warned = time.monotonic()
        if self.room():
            return
        if not self._cluster.may_grow:
            raise UserError(f"launch: a run needs {self.shown_needs()}: this machine has less")
        log.warning(
            "waiting: no node has what a run needs (%s; nodes: %d)",
            *(self.shown_needs(), len(self._cluster.nodes())),
        )

    def shown_needs(self) -> str:
        """What a task takes, in words."""
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
        gpus = float(needs.num_ranks) if any(node.get("GPU", 0) for node in nodes) else 0.0
    request = {"num_cpus": float(needs.cpus or needs.num_ranks), "num_gpus": gpus}
    if needs.memory_gib is not None:
        request["memory"] = needs.memory_gib * GIB
    return request


def _room(node: Mapping[str, float], request: Mapping[str, float]) -> int:
    amounts = {RESOURCES[name]: amount for name, amount in request.items() if amount}
    return min(int(node.get(name, 0) / amount) for name, amount in amounts.items())


def _entry(module: str, function: str, gpus: float) -> Callable[[Order], tuple[str | None, Any]]:
    """The task. Ray sends it by value, so that a node without alignlab can say so."""

    def carry_out(order: Order) -> tuple[str | None, Any]:
        import importlib
        import os
        import socket

        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides GPUs from no task that takes none
        try:
            from alignlab.errors import UserError

            job = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            node = socket.gethostname()
            return f"node {node}: {error}: install the same alignlab on every node", None
        try:
            return None, job(order)
        except UserError as error:
            return str(error), None

    return carry_out


@contextmanager
def connected(address: str | None) -> Iterator[RayCluster]:
    """Connects to a cluster for a while; one that was started for it ends with it.

    Args:
        address: `HOST:PORT` or `auto`; None: `RAY_ADDRESS`, else a new cluster on this machine.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
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
        line = first_line(error)
        if address == "auto":
            line = "no node of a cluster here: start one with `ray start`, or name HOST:PORT"
        raise UserError(f"Ray at {address}: {line}") from error
    interruption.handle_again()  # Ray puts its own handler of SIGTERM in place
    try:
        yield RayCluster(ray, may_grow=address != "local")
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself waits many minutes for a cluster that is not there."""
    if address == "auto":  # as Ray resolves it; the file may name a cluster that has ended
        file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        latest = file.read_text().strip() if file.exists() else ""
        address = os.environ.get("RAY_ADDRESS") or latest
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster at {address}: {error.strerror or error}; "
            "if one runs elsewhere, name it: --ray-address HOST:PORT"
        ) from None
