"""A command of alignlab in a forked child: all that differs from a command line is the start."""

import importlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
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


class ForkedProcess:
    """Stands for a `subprocess.Popen` of `python -m alignlab ...`, without its start of seconds.

    Args:
        command: with the interpreter.
        environment: the child's, besides what it has.
        log: gets what it writes to stderr.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "alignlab"]
        self._forked = ForkedCommand(command[3:], log)

        def begin() -> None:
            os.environ.update(environment)
            logging.getLogger("alignlab").handlers.clear()  # those of the command that forks

        self._forked.start(begin)
        self.pid = self._forked.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """As that of a `Popen`."""
        return self.wait(0.01)

    def wait(self, timeout: float = 900) -> int | None:
        """As that of a `Popen`, but gives None where the process is still alive."""
        if self.returncode is None:
            self.returncode = self._forked.wait(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As that of a `Popen`."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As that of a `Popen`."""
        self.send_signal(signal.SIGKILL)


def _write_to(errors: Path) -> None:
    with errors.open("ab") as file:
        os.dup2(file.fileno(), 2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
