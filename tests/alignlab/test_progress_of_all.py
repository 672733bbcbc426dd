"""One line over several trainings, and how long it says that they still take."""

import io
import logging

import pytest
from rich.console import Console

from alignlab import progress
from alignlab.progress import TimeLeft, shown_duration, step_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`clock[0]` is the time, in seconds."""
    now = [1000.0]
    monkeypatch.setattr("alignlab.progress.time.monotonic", lambda: now[0])
    return now


def part(label: str, done: int, note: str) -> tuple[int, str] | None:
    return (done, f"0 of 2 runs finished, {note}") if label == "all/none" else None


def test_what_comes_before_the_first_step_is_no_part_of_the_estimate(clock: list[float]) -> None:
    left = TimeLeft(total=45_000, done=0)
    clock[0] += 20.0
    assert left.after(0) is None, "models are loaded"
    clock[0] += 100.0
    assert left.after(20) is None, "one look says nothing of the speed"
    clock[0] += 5.0
    assert left.after(30) == pytest.approx(44_970 * 0.5)
    assert left.after(45_000) == 0.0


def test_an_estimate_survives_a_resume_that_goes_back(clock: list[float]) -> None:
    left = TimeLeft(total=100, done=50)
    assert left.after(40) is None  # the checkpoint is older than the log
    clock[0] += 10.0
    assert left.after(51) is None
    clock[0] += 10.0
    assert left.after(52) == pytest.approx(480.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599.0, "60 min"), (12180.0, "3 h 23 min")],
)
def test_durations_have_hours_and_minutes(seconds: float, text: str) -> None:
    assert shown_duration(seconds) == text.replace("60 min", "1 h 0 min")


def train_two_runs(clock: list[float]) -> None:
    with step_progress("all", total=8, part=part) as advance:
        clock[0] += 60.0
        with step_progress("all/none", total=4) as run:
            for step in (1, 2, 3):
                clock[0] += 30.0
                run(step, f"loss 0.{step}")
            with step_progress("samples", total=5) as samples:
                clock[0] += 30.0
                samples(1, "")
        advance(8, "2 of 2 runs finished")


def test_the_steps_of_a_run_are_those_of_all(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="alignlab"):
        train_two_runs(clock)
    assert caplog.messages == [
        "all: 1/8, time left not known yet  0 of 2 runs finished, loss 0.1",
        "all: 2/8, 3 min left  0 of 2 runs finished, loss 0.2",
        "all: 3/8, 2 min left  0 of 2 runs finished, loss 0.3",
        "samples: 1/5, time left not known yet",
        "all: 8/8, 0 s left  2 of 2 runs finished",
    ]


def test_on_a_terminal_a_run_has_a_bar_below_and_log_lines_stand_above(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, legacy_windows=False)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    log = logging.getLogger("alignlab")
    handler = logging.StreamHandler(io.StringIO())  # as the command line has one
    log.addHandler(handler)
    monkeypatch.setattr(log, "level", logging.INFO)
    before = handler.stream
    try:
        with step_progress("all", total=8, part=part):
            with step_progress("all/none", total=4) as run:
                run(2, "loss 0.2")
                log.info("a line of the log")
    finally:
        log.removeHandler(handler)
    assert handler.stream is before and before.getvalue() == ""
    shown = screen.getvalue()
    assert "a line of the log\n" in shown
    frame = shown.split("a line of the log\n")[1]
    assert "all/none" in frame and "2/8" in frame and "0 of 2 runs finished, loss 0.2" in frame
