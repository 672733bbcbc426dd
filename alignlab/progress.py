"""Progress and warnings on the terminal, and in a log file where there is no terminal."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from alignlab import interruption
from alignlab.distributed import launch_env

log = logging.getLogger(__name__)

LINE_EVERY_S = 20.0

Advance = Callable[[int, str], None]

Part = Callable[[str, int, str], tuple[int, str] | None]
"""Gets label, steps done and note of a progress within another one; gives steps done and note of
the other one, or None if it is no part of that."""

_wholes: list[Callable[[str, int, str], bool]] = []  # that the ones within them may be parts of
_bars: list[Progress] = []  # that are on the terminal: one, or none
_depth = 0  # of progress within progress


@cache
def warn_once(text: str) -> None:
    """Logs a warning that every run of a command would repeat, such as one about the data."""
    log.warning("%s", text)


@cache
def tell_once(text: str) -> None:
    """Logs a fact that every run of a command would repeat, such as one about a teacher."""
    log.info("%s", text)


def tell(text: str) -> None:
    """Logs a line; on a terminal that shows a bar, above it."""
    if _bars:
        _bars[0].console.print(Text(text))
    else:
        log.info("%s", text)


class TimeLeft:
    """Seconds until the last step, by the steps since the first that was seen to be done.

    What comes before that (models are loaded, clips encoded) says nothing of those that follow.

    Args:
        total: steps.
        done: steps that were done before.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._first = done
        self._since: float | None = None

    def after(self, done: int) -> float | None:
        """None until a second step is done."""
        if done >= self._total:
            return 0.0
        if self._since is None and done > self._first:
            self._first, self._since = done, time.monotonic()
        if self._since is None or done <= self._first:
            return None
        step_s = (time.monotonic() - self._since) / (done - self._first)
        return step_s * (self._total - done)


def shown_duration(seconds: float) -> str:
    """A time to wait for, no finer than anybody plans with.

    >>> [shown_duration(seconds) for seconds in (4.2, 200.0, 12180.0, 270000.0)]
    ['4 s', '3 min', '3 h 23 min', '3 d 3 h']
    """
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def _shown_left(seconds: float | None) -> str:
    return "time left not known yet" if seconds is None else f"{shown_duration(seconds)} left"


@contextmanager
def step_progress(
    label: str, *, total: int, done: int = 0, part: Part | None = None
) -> Iterator[Advance]:
    """Gives `advance(done, note)`: a bar with the remaining time, or a line every 20 seconds.

    Within another one, the bar is under that one's and goes away at the end. It is where loops see
    that they were interrupted (`alignlab.interruption.check`).

    Args:
        label: what is counted.
        total: steps.
        done: steps that were done before.
        part: what the steps of those within it are of this one, which then advances as they do;
            they write no lines of their own. None: nothing.
    """
    outer = list(_wholes)
    with _shown(label, total, done) as show, ExitStack() as stack:

        def tell_all(done: int, note: str) -> None:
            is_part = any([tell_whole(label, done, note) for tell_whole in outer])
            if _bars or not is_part:
                show(done, note)

        def advance(done: int, note: str) -> None:
            tell_all(done, note)
            interruption.check()

        if part is not None:
            stack.enter_context(_with_parts(tell_all, part))
        yield advance


@contextmanager
def _with_parts(show: Advance, part: Part) -> Iterator[None]:
    def tell_whole(label: str, done: int, note: str) -> bool:
        found = part(label, done, note)
        if found is not None:
            show(*found)
        return found is not None

    _wholes.append(tell_whole)
    try:
        yield
    finally:
        _wholes.remove(tell_whole)


@contextmanager
def _shown(label: str, total: int, done: int) -> Iterator[Advance]:
    global _depth
    if launch_env.rank() > 0:  # rank 0 speaks for all
        yield lambda done, note: None
        return
    _depth += 1
    try:
        if _bars:
            with _another_bar(_bars[0], label, total, done) as advance:
                yield advance
        elif (console := Console(stderr=True)).is_terminal:
            with _bar(console, label, total, done) as advance:
                yield advance
        else:
            yield _lines(label, total, done, is_inner=_depth > 1)
    finally:
        _depth -= 1


@contextmanager
def _bar(console: Console, label: str, total: int, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress, _log_lines_above():
        _bars.append(progress)
        try:
            with _another_bar(progress, label, total, done, stays=True) as advance:
                yield advance
        finally:
            _bars.remove(progress)


@contextmanager
def _log_lines_above() -> Iterator[None]:
    """The log's lines go through the stream that rich puts in place of stderr, above the bars."""
    before: list[tuple[logging.StreamHandler[Any], Any]] = []
    for handler in logging.getLogger("alignlab").handlers:
        if type(handler) is logging.StreamHandler:
            before.append((handler, handler.setStream(sys.stderr)))
    try:
        yield
    finally:
        for handler, stream in before:
            if stream is not None:  # it was another one
                handler.setStream(stream)


@contextmanager
def _another_bar(
    progress: Progress, label: str, total: int, done: int, *, stays: bool = False
) -> Iterator[Advance]:
    task = progress.add_task(label, total=total, completed=done, note="", left="")
    time_left = TimeLeft(total, done)

    def advance(done: int, note: str) -> None:
        left = _shown_left(time_left.after(done))
        progress.update(task, completed=done, note=note, left=left)

    try:
        yield advance
    finally:
        if not stays:
            progress.remove_task(task)


def _lines(label: str, total: int, start: int, *, is_inner: bool) -> Advance:
    last = time.monotonic()
    time_left = TimeLeft(total, start)

    def advance(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        left = time_left.after(done)
        is_end = done >= total and not is_inner  # whoever is around it says that it is over
        if now - last < LINE_EVERY_S and not is_end:
            return
        last = now
        spaced = f"  {note}" if note else ""
        log.info("%s: %d/%d, %s%s", label, done, total, _shown_left(left), spaced)

    return advance
