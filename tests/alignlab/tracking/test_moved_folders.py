"""Run folders that were copied or moved: whose run of MLflow is it."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from alignlab.config.run import RunConfig
from alignlab.runs.checksums import write_json
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import Tracker
from alignlab.tracking.mlflow_run import FOLDER, PARENT, STATE, read_state, write_tags
from alignlab.tracking.send import send_run

MakeConfig = Callable[..., RunConfig]
Log = Callable[..., RunFolder]


@pytest.fixture
def log(put_database: Callable[[Path], Path], make_config: MakeConfig, tmp_path: Path) -> Log:
    """`log("orig", step, ...)` is a training of these steps, resumed after the first of them."""
    put_database(tmp_path)

    def log_steps(name: str, *steps: int, output: Path = tmp_path) -> RunFolder:
        config = make_config("tracking.mlflow=sqlite", f"name={name}", f"output={output}")
        run = RunFolder.create(config)
        with Tracker(run, config, start=steps[0], environment={}) as tracker:
            for step in steps:
                tracker.log(step, {"loss/total": 1.0})
        return run

    return log_steps


def sent(output: Path) -> dict[str, tuple[Any, list[int]]]:
    """MLflow's runs by name, and the steps that each has."""
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    runs = {
        str(run.info.run_name): (
            run,
            [m.step for m in client.get_metric_history(run.info.run_id, "loss/total")],
        )
        for run in found
    }
    assert len(runs) == len(found)
    return runs


@pytest.mark.parametrize("is_older", [False, True])
def test_a_copy_gets_a_run_of_its_own(
    is_older: bool, log: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "alignlab")
    orig = log("orig", 0, 1)
    write_tags(orig.path, {PARENT: "0" * 32, "alignlab.variant": "none"})
    if is_older:  # that version did not write the folder
        state = read_state(orig.path)
        assert state.pop(FOLDER) == str(orig.path)
        write_json(orig.path / STATE, state)
    copy = shutil.copytree(orig.path, tmp_path / "copy")
    log("copy", 1, 2)
    runs = sent(tmp_path)
    assert {name: steps for name, (_, steps) in runs.items()} == {"orig": [0, 1], "copy": [0, 1, 2]}
    told = f"{copy} is a copy of {orig.path}: MLflow gets a run of its own for it"
    assert caplog.text.count(told) == 1
    assert PARENT not in runs["copy"][0].data.tags
    assert read_state(orig.path)["run_id"] == runs["orig"][0].info.run_id
    log("copy", 2, 3)
    log("orig", 1, 4)
    steps = {name: steps for name, (_, steps) in sent(tmp_path).items()}
    assert steps == {"orig": [0, 1, 4], "copy": [0, 1, 2, 3]}
    assert caplog.text.count("is a copy of") == 1


def test_a_copy_that_is_sent_later_has_the_name_of_its_folder(log: Log, tmp_path: Path) -> None:
    orig = log("orig", 0, 1)
    copy = shutil.copytree(orig.path, tmp_path / "deep" / "copy")
    assert send_run(copy.rename(tmp_path / "copy"))
    steps = {name: steps for name, (_, steps) in sent(tmp_path).items()}
    assert steps == {"orig": [0, 1], "copy": [0, 1]}


def test_a_folder_that_was_renamed_keeps_its_run(log: Log, tmp_path: Path) -> None:
    orig = log("orig", 0, 1)
    before, _ = sent(tmp_path)["orig"]
    orig.path.rename(tmp_path / "renamed")
    log("renamed", 1, 2)
    ((name, (run, steps)),) = sent(tmp_path).items()
    assert (name, run.info.run_id, steps) == ("renamed", before.info.run_id, [0, 1, 2])


def test_an_output_that_was_copied_with_its_database_goes_on_there(
    log: Log, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    shutil.move(tmp_path / "mlflow.db", tmp_path / "runs")
    log("orig", 0, 1, output=tmp_path / "runs")
    shutil.copytree(tmp_path / "runs", tmp_path / "other")
    log("orig", 1, 2, output=tmp_path / "other")
    for output, steps in {"runs": [0, 1], "other": [0, 1, 2]}.items():
        ((name, (_, found)),) = sent(tmp_path / output).items()
        assert (name, found) == ("orig", steps)
