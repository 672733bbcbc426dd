"""Progress and warnings on the terminal, and in a log file where there is no terminal."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from alignlab import interruption
from alignlab.distributed import launch_env

log = logging.getLogger(__name__)

LINE_EVERY_S = 20.0

Advance = Callable[[int, str], None]

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


@contextmanager
def step_progress(label: str, *, total: int, done: int = 0) -> Iterator[Advance]:
    """Gives `advance(done, note)`: a bar with the remaining time, or a line every 20 seconds.

    Within another one, the bar is under that one's and goes away at the end. It is where loops see
    that they were interrupted (`alignlab.interruption.check`).
    """
    with _shown(label, total, done) as show:

        def advance(done: int, note: str) -> None:
            show(done, note)
            interruption.check()

        yield advance


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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        _bars.append(progress)
        try:
            task = progress.add_task(label, total=total, completed=done, note="")
            yield lambda done, note: progress.update(task, completed=done, note=note)
        finally:
            _bars.remove(progress)


@contextmanager
def _another_bar(progress: Progress, label: str, total: int, done: int) -> Iterator[Advance]:
    task = progress.add_task(label, total=total, completed=done, note="")
    try:
        yield lambda done, note: progress.update(task, completed=done, note=note)
    finally:
        progress.remove_task(task)


def _lines(label: str, total: int, start: int, *, is_inner: bool) -> Advance:
    begin = last = time.monotonic()

    def advance(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        is_end = done >= total and not is_inner  # whoever is around it says that it is over
        if now - last < LINE_EVERY_S and not is_end:
            return
        last = now
        left = (now - begin) / max(1, done - start) * (total - done)
        spaced = f"  {note}" if note else ""
        log.info("%s: %d/%d, %.0f s left%s", label, done, total, left, spaced)

    return advance
