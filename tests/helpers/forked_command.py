"""A command of alignlab in a forked child: all that differs from a command line is the start."""

import importlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import descendants


class ForkedCommand:
    """A command in a session of its own; what it prints goes nowhere.

    Args:
        arguments: of the command line, without the name of the program.
        errors: file that its stderr is added to.
    """

    def __init__(self, arguments: Sequence[str], errors: Path) -> None:
        self.errors = errors
        self.begun = time.monotonic()
        self._arguments = arguments
        self.pid = 0

    def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Starts it; `prepare` is called in the child before anything else."""
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            os.setsid()
            # a shell that starts this in the background has it ignored
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _write_to(self.errors)
            warnings.resetwarnings()  # in a test they are errors
            prepare()
            sys.argv = ["alignlab", *self._arguments]
            importlib.import_module("alignlab.cli").main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def send(self, number: int) -> None:
        """Sends a signal to it and to all processes that it has started."""
        for pid in (self.pid, *descendants(self.pid)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def wait(self, timeout: float) -> int | None:
        """Its exit code, negative for a signal; None if it is still alive after `timeout`, s."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    def kill(self) -> None:
        """Ends what is stuck."""
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _write_to(errors: Path) -> None:
    with errors.open("ab") as file:
        os.dup2(file.fileno(), 2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
