"""Forked processes that know each other, as torchrun starts them."""

import os
import socket
import traceback
from collections.abc import Callable


def forked_ranks(count: int, work: Callable[[int], object]) -> list[int]:
    """Does `work(rank)` in `count` processes at once; gives their exit codes, in order of rank.

    A single one has no process group. One whose work raises ends with 1.
    """
    port, pids = free_port(), []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                if count > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
                    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
                work(rank)
            except SystemExit:
                raise  # through the caller, to the interpreter's end, as that of a command
            except BaseException:  # else a second process would go on with the caller's work
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
