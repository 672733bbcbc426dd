"""Progress and warnings on the terminal, and in a log file where there is no terminal."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignlab import interruption
from alignlab.distributed import launch_env

log = logging.getLogger(__name__)

LINE_EVERY_S = 20.0

Advance = Callable[[int, str], None]


@cache
def warn_once(text: str) -> None:
    """Logs a warning that every run of a command would repeat, such as one about the data."""
    log.warning("%s", text)


@cache
def tell_once(text: str) -> None:
    """Logs a fact that every run of a command would repeat, such as one about a teacher."""
    log.info("%s", text)


@contextmanager
def step_progress(label: str, *, total: int, done: int = 0) -> Iterator[Advance]:
    """Gives `advance(done, note)`: a bar with the remaining time, or a line every 20 seconds.

    It is where loops see that they were interrupted (`alignlab.interruption.check`).
    """
    with _shown(label, total, done) as show:

        def advance(done: int, note: str) -> None:
            show(done, note)
            interruption.check()

        yield advance


@contextmanager
def _shown(label: str, total: int, done: int) -> Iterator[Advance]:
    if launch_env.rank() > 0:  # rank 0 speaks for all
        yield lambda done, note: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(label, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, completed=done, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)


def _lines(label: str, total: int, start: int) -> Advance:
    begin = last = time.monotonic()

    def advance(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY_S and done < total:
            return
        last = now
        left = (now - begin) / max(1, done - start) * (total - done)
        spaced = f"  {note}" if note else ""
        log.info("%s: %d/%d, %.0f s left%s", label, done, total, left, spaced)

    return advance
