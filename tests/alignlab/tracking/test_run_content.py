"""What MLflow gets of a run besides its rows: clips, data set, digests, model card, machine."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Run

from alignlab.config.run import RunConfig
from alignlab.data.video import write_mp4
from alignlab.runs.checksums import read_json
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import Tracker
from alignlab.tracking.send import send_run
from alignlab.train import train

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]


def run_of(output: Path) -> tuple[MlflowClient, Run]:
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name != 'Default'")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def data_sets(run: Run) -> list[DatasetInput]:
    assert run.inputs is not None
    return list(run.inputs.dataset_inputs)


def test_mlflow_has_clips_data_set_digests_and_model_card(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("tracking.mlflow=sqlite", "eval.sample_clips=2", "steps=1")
    folder = train(config)
    client, run = run_of(tmp_path)
    clips = {file.path for file in client.list_artifacts(run.info.run_id, "samples")}
    assert clips == {"samples/0.mp4", "samples/1.mp4", "samples/samples.json"}
    sent = Path(client.download_artifacts(run.info.run_id, "samples/1.mp4", str(tmp_path)))
    assert sent.read_bytes() == (folder / "samples" / "1.mp4").read_bytes()

    (data,) = data_sets(run)
    assert data.dataset.name == "shapes" and data.dataset.digest.startswith("v2-")
    assert {tag.value for tag in data.tags} == {"training"}
    record = read_json(folder / "inputs.json", fix="")
    for one in record["inputs"]:
        assert run.data.tags[f"alignlab.digest.{one['name']}"] == one["digest"]
    assert "alignlab.digest.model/vae" in run.data.tags

    card = client.download_artifacts(run.info.run_id, "model_card.md", str(tmp_path))
    text = Path(card).read_text()
    assert "| ra | refalign | arXiv:" in text and "| optimizer steps | 1 |" in text
    assert f"| val/flow | {run.data.metrics['val/flow']:.6g} |" in text

    assert send_run(folder)  # everything again
    _, again = run_of(tmp_path)
    assert len(data_sets(again)) == 1


def test_other_data_have_another_digest(make_config: MakeConfig, tmp_path: Path) -> None:
    digests = []
    overrides: tuple[list[str], ...] = ([], ["data.train_clips=5"], ["data.workers=1"])
    for number, override in enumerate(overrides):
        place = f"sqlite:///{tmp_path}/mlflow.db"
        config = make_config(f"tracking.mlflow={place}", f"name=e{number}", *override)
        with Tracker(RunFolder.create(config), config, start=0, environment={}) as tracker:
            tracker.log(0, {"loss/total": 1.0})
        client = MlflowClient(place)
        experiment = client.get_experiment_by_name(f"e{number}")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        digests.append(data_sets(run)[0].dataset.digest)
    assert digests[0] == digests[2] != digests[1]


def test_no_clip_is_begun_after_the_time_is_over(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("tracking.mlflow=sqlite")
    folder = RunFolder.create(config)
    folder.samples.mkdir()
    for number in range(3):
        write_mp4(folder.samples / f"{number}.mp4", _frames(), 8)
    add, sent = MlflowClient.log_artifact, list[str]()

    def slow(self: MlflowClient, run_id: str, path: str, *rest: Any) -> None:
        add(self, run_id, path, *rest)
        sent.append(Path(path).name)
        if path.endswith("0.mp4"):
            now = time.monotonic
            monkeypatch.setattr("alignlab.tracking.tracker.time.monotonic", lambda: now() + 1e4)

    monkeypatch.setattr(MlflowClient, "log_artifact", slow)
    with Tracker(folder, config, start=0, environment={}) as tracker:
        tracker.log(0, {"loss/total": 1.0})
    assert sent == ["recipe.yaml", "0.mp4"]
    monkeypatch.undo()
    assert send_run(folder.path)
    client, run = run_of(tmp_path)
    assert len(client.list_artifacts(run.info.run_id, "samples")) == 3


def _frames() -> Any:
    import torch

    return torch.zeros(5, 16, 16, 3, dtype=torch.uint8)


@pytest.mark.parametrize("settings", [[], ["tracking.system_metrics=true"]])
def test_nothing_measures_the_machine_unless_asked(
    settings: list[str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monitor = "mlflow.system_metrics.system_metrics_monitor.SystemMetricsMonitor"
    monkeypatch.setattr(f"{monitor}.start", lambda self: started.append("start"))
    monkeypatch.setattr(f"{monitor}.finish", lambda self: started.append("finish"))
    config = make_config("tracking.mlflow=sqlite", *settings)
    with Tracker(RunFolder.create(config), config, start=0, environment={}) as tracker:
        tracker.log(1, {"loss/total": 1.0})
    assert started == ["start", "finish"] * len(settings)


def test_the_machine_is_measured_if_asked(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    config = make_config("tracking.mlflow=sqlite", "tracking.system_metrics=true")
    steps: list[int] = []
    for start in (0, 1):  # trained, and resumed
        folder = RunFolder.create(config)
        with Tracker(folder, config, start=start, environment={}) as tracker:
            tracker.log(start + 1, {"loss/total": 1.0})
            for _ in range(1200):
                client, run = run_of(tmp_path)
                found = client.get_metric_history(
                    run.info.run_id, "system/cpu_utilization_percentage"
                )
                if len(found) > len(steps) + 1:
                    break
                time.sleep(0.05)
        client, run = run_of(tmp_path)
        name = "system/cpu_utilization_percentage"
        now = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        assert now[: len(steps)] == steps
        steps = now
    assert steps and steps == list(range(len(steps)))
    assert run.info.status == "FINISHED" and json.dumps(run.data.metrics["loss/total"]) == "1.0"
