"""A run's folder as data, finished or not, and the trainings of Stage 1."""

import json
import shutil
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments import load_run
from alignlab.runs.metric_rows import read_rows
from tiny_runs import MakeConfig, TrainUntil

pytestmark = pytest.mark.usefixtures("shared_clips")


def test_a_finished_run_is_its_recipe_its_log_and_its_result(full_run: Path) -> None:
    run = load_run(full_run)
    assert run.config.steps == 2
    written = json.loads((full_run / "result.json").read_text())
    assert run.metrics == written["metrics"]
    frame = run.to_frame()
    final = frame[frame["final"]].set_index("metric")
    assert final["value"].to_dict() == written["metrics"] and set(final["step"]) == {2}
    assert not frame.duplicated(["metric", "step", "final"]).any()
    assert len(frame[frame["metric"] == "val/flow"]) == 1
    flow = frame[frame["metric"] == "loss/flow"]
    logged = {
        row["step"]: row["loss/flow"]
        for row in read_rows(full_run / "metrics.jsonl")
        if "loss/flow" in row
    }
    assert dict(zip(flow["step"], flow["value"], strict=True)) == logged


def test_the_log_is_a_row_per_line(full_run: Path) -> None:
    log = load_run(full_run).log_frame()
    rows = read_rows(full_run / "metrics.jsonl")
    assert len(log) == len(rows) and {"step", "time"} <= set(log.columns)
    assert log["step"].tolist() == [row["step"] for row in rows]


def test_an_unfinished_run_has_no_final_number(
    make_config: MakeConfig, train_until: TrainUntil
) -> None:
    config = make_config("steps=3", "checkpoint.every=1")
    train_until(config, 2)
    run = load_run(Path(config.output) / config.name)
    assert run.result is None and run.metrics == {}
    frame = run.to_frame()
    assert not frame["final"].any() and {1, 2} <= set(frame["step"])


def test_damage_is_told(full_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(full_run, copy)
    log = copy / "metrics.jsonl"
    log.write_text(log.read_text().replace("1", "2", 1))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        load_run(copy)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tiny: no such folder; alignlab\.recipe\.load_run reads"):
        load_run("tiny")
    with pytest.raises(UserError, match="no run there"):
        load_run(tmp_path)
    (tmp_path / "comparison.json").touch()
    with pytest.raises(UserError, match=r"holds a comparison: .*load_comparison reads it"):
        load_run(tmp_path)
