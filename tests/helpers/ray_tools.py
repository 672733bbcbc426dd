"""Real Ray clusters on this machine, and commands on them that are watched and killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import descendants

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_period_ms": "1000",  # a node that is gone is dead after 5 s
}
# In a process of its own: Ray makes the process that starts a cluster the leader of a group.
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster()
settings = dict(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
places = [{}, *({"node_ip_address": address} if address else {} for address in sys.argv[1:])]
nodes = [cluster.add_node(**settings, **place) for place in places]
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Nodes:
    """A cluster: its address and the process of each node, the head first."""

    address: str
    raylets: tuple[int, ...]

    def kill(self, index: int) -> None:
        """Kills all processes of a node, as when its machine loses power."""
        for pid in {self.raylets[index], *descendants(self.raylets[index])}:
            kill(pid)


@contextmanager
def nodes(*others: str) -> Iterator[Nodes]:
    """A cluster whose nodes have one CPU each; nothing of it is left afterwards.

    Args:
        others: network addresses of the nodes besides the head; empty: the head's.
    """
    starter = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, *others],
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert starter.stdout is not None
        started = json.loads(starter.stdout.readline())
        yield Nodes(started["address"], tuple(started["raylets"]))
    finally:
        for pid in {starter.pid, *descendants(starter.pid)}:
            kill(pid)
        starter.communicate()


@contextmanager
def command(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`alignlab` with these arguments, for as long as this is entered; its lines go to a file."""
    with log.open("w") as out:
        driver = subprocess.Popen(
            [sys.executable, "-m", "alignlab.cli", *arguments],
            env=os.environ | ENVIRONMENT,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield driver
    finally:
        for pid in {driver.pid, *descendants(driver.pid)}:
            kill(pid)
        driver.wait()


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
