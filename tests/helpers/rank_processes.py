"""Forked processes that know each other, as torchrun starts them."""

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from alignlab.cli import main as command

MOST_S = 900  # that ranks may take


def driven(work: Callable[[], None], folder: Path) -> list[str]:
    """Does `work` in a forked process, which forks ranks; gives the lines that it prints.

    Args:
        work: anything that it changes is changed there alone.
        folder: made if need be; what is printed is left there, in `printed` and `errors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gc.collect()  # here: a group of processes that is gone has threads, which a fork has not
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            signal.alarm(MOST_S)  # which kills it: a hang fails the test
            _write_to(folder / "printed", folder / "errors")
            warnings.resetwarnings()  # in a test they are errors
            logging.getLogger("alignlab").handlers.clear()  # those of other commands
            torch.set_num_threads(1)
            gc.freeze()  # else each process searches all that is imported
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"ended with {code}: {(folder / 'errors').read_text()}"
    return (folder / "printed").read_text().strip().split("\n")


def run_command(arguments: Sequence[str], said: Path, *, whole: bool = False) -> NoReturn:
    """Runs a command of alignlab in this process, which ends with it.

    Args:
        arguments: of the command line, without the name of the program.
        said: file that gets what it prints.
        whole: the interpreter is taken apart, as after any command. It takes seconds.
    """
    signal.alarm(MOST_S)  # no rank outlives a driver that was killed
    _write_to(said, said)
    sys.argv = ["alignlab", *arguments]
    code = 1
    try:
        command()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if whole:
        gc.unfreeze()  # else Triton's binding tells at the end what was never collected
        ctypes.pythonapi.Py_Exit(code)
    os._exit(code)


def _write_to(out: Path, errors: Path) -> None:
    for number, path in ((1, out), (2, errors)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)


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
