"""Progress within progress: an evaluation within a training."""

import io
import logging

import pytest
from rich.console import Console

from alignlab import progress
from alignlab.progress import step_progress, tell


def train_and_evaluate() -> None:
    with step_progress("run", total=2) as advance:
        for step in (1, 2):
            tell(f"evaluation at step {step}")
            with step_progress("val flow", total=1) as inner:
                inner(1, "")
            advance(step, "loss 0.5")


def test_without_a_terminal_an_inner_end_is_no_line_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="alignlab"):
        train_and_evaluate()
        with step_progress("probe", total=1) as advance:
            advance(1, "")
    assert caplog.messages == [
        "evaluation at step 1",
        "evaluation at step 2",
        "run: 2/2, 0 s left  loss 0.5",
        "probe: 1/1, 0 s left",
    ]


def test_on_a_terminal_both_have_bars_and_lines_stand_above(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, legacy_windows=False)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with caplog.at_level(logging.INFO, logger="alignlab"):
        train_and_evaluate()
    shown = screen.getvalue()
    assert "evaluation at step 2\n" in shown
    below = shown.split("evaluation at step 2\n")[1]
    assert "run" in below and "val flow" in below
    frame = below.split("\x1b[2K")[-1]  # what is left after lines were erased
    assert frame.startswith("run") and "val flow" not in frame
    assert caplog.messages == []
