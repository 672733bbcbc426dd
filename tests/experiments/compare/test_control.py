"""The recipe `control` finds the effect that is there, and claims none where none can be."""

from pathlib import Path

import pytest

from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.run import compare
from alignlab.experiments.launchers import make_launcher
from alignlab.experiments.report.steps_to_target import steps_to_target


def test_the_controls_differ_in_the_shuffle_alone() -> None:
    runs = load_compare("control").runs
    control, shuffled = (runs[name].model_dump() for name in ("control", "shuffled"))
    (one,), (other,) = (run["objectives"].values() for run in (control, shuffled))
    teachers = control["teachers"]
    assert teachers[other["teacher"]] == {**teachers[one["teacher"]], "shuffle": True}
    assert {**one, "teacher": None} == {**other, "teacher": None}
    control["objectives"] = shuffled["objectives"]
    assert control == shuffled
    assert control["model"]["init"] == "random"


@pytest.mark.slow
def test_the_controls_come_out(tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}"]
    config = load_compare("control", overrides)
    launcher = make_launcher("local", config.launch, workers=2, command=["control", *overrides])
    folder = compare(config, launcher=launcher).parent
    found = steps_to_target(Comparison.load(folder / "comparison.json"))
    control, shuffled = found["control"], found["shuffled"]
    assert not control.never and control.interval is not None
    assert control.interval[1] < 1.0
    assert shuffled.interval is None or shuffled.interval[1] >= 1.0
