"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2: a command ends with one line that says how far it came.

A signal raises `Interrupted` where the program stands, but for SIGTERM and SIGUSR1 within
`deferred`: there a training takes its step to the end, writes a checkpoint and stops. SIGUSR2 is as
SIGTERM (submitit has SLURM send it). Python drops what is raised inside `__del__` or a weakref's
callback, and libraries may catch it. So the signal is kept as well: loops read it (`check`,
`asked`), and what Python dropped is raised again.

Signals are handled in the command line alone (`handled`). Programs that call alignlab keep their
own handlers; for them nothing here does anything.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Windows has no SIGUSR1 and SIGUSR2.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
USR1 = int(getattr(signal, "SIGUSR1", 0))
# A terminal and a launcher, or a scheduler and torchrun, may each pass on what was one signal.
AGAIN_S = 1.0
RAISE_AGAIN_S = 0.05


class Interrupted(KeyboardInterrupt):
    """A signal stops the command.

    Args:
        number: of the signal.
        told: whether another process says so.
    """

    def __init__(self, number: int, *, told: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.told = told
        _state.dropped = 0


class _State:
    """What came so far."""

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0 for none
        self.since = 0.0
        self.dropped = 0  # of what Python has dropped, until it is raised again
        self.deferring = False
        self.is_held = False
        self.held = 0  # of the signal that is raised once nothing is held
        self.handlers: dict[int, Any] = {}  # those before ours
        self.is_told = False
        self.is_task = False


_state = _State()


def run(command: Callable[[], None]) -> None:
    """Runs a command, the only thing that this process does, and ends it as it ends.

    Raises:
        SystemExit: of the command, or with the exit code of an interruption.
    """
    try:
        with handled():
            try:
                command()
            except KeyboardInterrupt as stop:
                sys.exit(tell(stop))
            finally:
                # Typer makes an exit code of it. An import that was cut short may end in any error.
                if _state.number and not _state.is_told:
                    sys.exit(tell(Interrupted(_state.number)))
    finally:  # no traceback of what is being taken apart
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def handled(*, sent_by_ray: bool = False) -> Iterator[None]:
    """Handles the signals for a while; in the main thread alone, and once.

    A signal that is ignored (`nohup`, a job that a script put into the background) stays so.

    Args:
        sent_by_ray: Ray ends a task with a SIGINT, which then counts as a SIGTERM; the other
            signals are Ray's own.
    """
    global _state
    if _state.handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state = _State()
    _state.is_task = sent_by_ray
    hook = sys.unraisablehook
    sys.unraisablehook = _unraisable(hook)
    for number in SIGNALS[:1] if sent_by_ray else SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            _state.handlers[number] = signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in _state.handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        _state = _State()


def handle_again() -> None:
    """Takes the signals back from a library that has put handlers of its own in place."""
    for number in _state.handlers:
        signal.signal(number, _on_signal)


def asked() -> int:
    """The signal that asks for an end; 0 for none."""
    return _state.number


def check() -> None:
    """Ends a command whose signal was lost; loops call it. Does nothing within `deferred`.

    Raises:
        Interrupted: there was a signal.
    """
    if _state.number and not _state.deferring:
        raise Interrupted(_state.number)


@contextmanager
def deferred(is_deferred: bool = True) -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise nothing for a while: who enters this reads `asked`.

    A second SIGTERM does raise. `deferred(False)` within it lets them raise again.
    """
    before, _state.deferring = _state.deferring, is_deferred
    try:
        yield
    finally:
        _state.deferring = before


@contextmanager
def held() -> Iterator[None]:
    """No signal raises anything inside, for what may not be left half done; one does at the end."""
    before, _state.is_held = _state.is_held, True
    try:
        yield
    finally:
        _state.is_held = before
    if before:
        return
    number, _state.held = _state.held, 0
    if number or _state.dropped:
        raise Interrupted(number or _state.dropped)


@contextmanager
def telling(how_far: Callable[[], str]) -> Iterator[None]:
    """Adds to what is said of an interruption how far the work inside came."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(how_far())
        raise


def line(stop: KeyboardInterrupt) -> str:
    """What the command line says of an interruption."""
    number = _number(stop)
    name = "" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
    notes = getattr(stop, "__notes__", [])
    if not notes:
        return f"interrupted{name}: run the same command again"
    return f"interrupted{name} {', '.join(notes)}: run the same command again to resume"


def tell(stop: KeyboardInterrupt, who: str = "") -> int:
    """Says so on stderr, once; returns the exit code: 128 and the number of the signal.

    Args:
        stop: what ended the command.
        who: which of several processes this is.
    """
    if not (_state.is_told or getattr(stop, "told", False)):
        print(line(stop) + who, file=sys.stderr)
    settle()
    return 128 + _number(stop)


def settle() -> None:
    """Another line has said why the command ends."""
    _state.is_told = bool(_state.handlers)


def _number(stop: KeyboardInterrupt) -> int:
    # a library may make a plain KeyboardInterrupt of ours, as Ray does of one within its own code
    return int(getattr(stop, "number", _state.number or signal.SIGINT))


def _on_signal(number: int, frame: object) -> None:
    if _state.dropped and not _state.is_held:
        raise Interrupted(_state.dropped)
    number = signal.SIGTERM if _state.is_task else number
    before, now = _state.number, time.monotonic()
    if before and now - _state.since < AGAIN_S:
        return
    is_first = not before or (before == USR1 and number != USR1)
    if is_first:
        _state.number, _state.since = number, now
    if _state.deferring and number != signal.SIGINT and (is_first or number == USR1):
        return
    if _state.is_held:
        _state.held = number
        return
    raise Interrupted(number)


def _unraisable(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Of what Python cannot raise, passes on all but our interruptions: these it raises soon."""

    def unraisable(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            hook(dropped)
            return
        _state.dropped = dropped.exc_value.number
        timer = threading.Timer(RAISE_AGAIN_S, _raise_again, [_state])
        timer.daemon = True
        timer.start()

    return unraisable


def _raise_again(state: _State) -> None:
    if state is not _state or not state.dropped:
        return
    number = signal.SIGINT if state.is_task else state.dropped
    if hasattr(signal, "pthread_kill"):  # ends what the main thread waits for
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)  # its handler runs in the main thread
