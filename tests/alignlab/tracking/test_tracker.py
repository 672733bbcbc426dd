"""Where the scalars of a run go: metrics.jsonl and MLflow."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from alignlab.config.run import RunConfig
from alignlab.recipe import recipe_hash
from alignlab.runs.metric_rows import read_rows
from alignlab.tracking import Tracker
from alignlab.tracking.mlflow_run import read_state
from alignlab.train import train
from kills import Killed

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]


def only_run(output: Path) -> tuple[MlflowClient, MlflowRun]:
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name != 'Default'")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_mlflow_has_the_run_and_a_resumed_run_continues_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config("steps=4", "checkpoint.every=2", "tracking.mlflow=sqlite")

    def killed_at_step_3(self: Tracker, step: int, scalars: dict[str, float]) -> None:
        if step == 3:
            raise Killed
        log(self, step, scalars)

    log = Tracker.log
    monkeypatch.setattr(Tracker, "log", killed_at_step_3)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    _, first = only_run(tmp_path)
    assert first.info.status == "FAILED"
    path = train(config)

    client, run = only_run(tmp_path)
    assert run.info.run_id == first.info.run_id
    assert run.info.status == "FINISHED"
    assert read_state(path)["run_id"] == run.info.run_id
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.params["objectives.ra.name"] == "refalign"
    assert run.data.tags["alignlab.recipe_hash"] == recipe_hash(config)
    assert "alignlab.torch" in run.data.tags
    logged: dict[tuple[str, int], float] = {}
    for row in read_rows(path / "metrics.jsonl"):
        names = row.keys() - {"step", "time"}
        logged |= {(name, int(row["step"])): row[name] for name in names}
    assert {name for name, _ in logged} == run.data.metrics.keys()
    for name in ("loss/total", "loss/ra/pull", "timesteps/t9", "val/flow/t0"):
        history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
        assert history == {step: value for (key, step), value in logged.items() if key == name}


def test_a_database_that_does_not_know_the_run_gets_a_new_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    path = train(make_config("steps=1", "tracking.mlflow=sqlite"))
    _, first = only_run(tmp_path)
    (path / "result.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere' / 'mlflow.db'}"
    train(make_config("steps=1", f"tracking.mlflow={elsewhere}"))
    _, second = only_run(tmp_path / "elsewhere")
    assert second.info.run_id != first.info.run_id
    assert second.data.metrics["val/flow"] == first.data.metrics["val/flow"]


def test_rows_written_before_a_kill_are_not_written_twice(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config("steps=3", "checkpoint.every=2")
    expected = [0, 1, 2, 3, 3]

    def killed(*_: object, **__: object) -> None:
        raise Killed

    # before the first checkpoint, after the last one, after the evaluation is logged
    for name in ("save_due", "evaluate", "RunFolder.write_result"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(f"alignlab.train.{name}", killed)
            train(config)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == expected
    train(config)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == expected
    assert sum("val/flow" in row for row in rows) == 1


def test_a_row_cut_off_by_a_kill_is_written_again(make_config: MakeConfig, tmp_path: Path) -> None:
    path = train(make_config("steps=2", "checkpoint.every=1", "checkpoint.keep=9"))
    whole = read_rows(path / "metrics.jsonl")
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text[: text.index('"step": 2') + 40])
    (path / "result.json").unlink()
    shutil.rmtree(path / "checkpoints" / "step-000002")
    train(make_config("steps=2", "checkpoint.every=1", "checkpoint.keep=9"))
    again = read_rows(path / "metrics.jsonl")
    assert [row["step"] for row in again] == [row["step"] for row in whole] == [0, 1, 2, 2]
    assert again[2]["loss/total"] == whole[2]["loss/total"]


def test_training_is_quiet(
    make_config: MakeConfig,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        train(make_config("tracking.mlflow=sqlite"))
    assert capfd.readouterr().err == ""
    assert {record.name.split(".")[0] for record in caplog.records} == {"alignlab"}
