"""MLflow fails, is killed with the run, or loses it: metrics.jsonl and MLflow agree in the end."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import ReadTimeout

from alignlab.config.run import RunConfig
from alignlab.errors import EndedEarlyError
from alignlab.runs.checksums import write_json
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import Tracker, ask, runs_address
from alignlab.tracking.connection import PACED, Connection
from alignlab.tracking.mlflow_run import (
    ENDED,
    STATE,
    TAGS,
    MlflowRun,
    read_state,
    read_tags,
    write_tags,
)
from alignlab.tracking.names import MAX_NAME, tracked_name
from alignlab.tracking.send import send_run
from alignlab.train import train
from kills import Killed

MakeConfig = Callable[..., RunConfig]
Points = Counter[tuple[str, int]]
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


class Output:
    """An output folder with a database, and a run in it."""

    def __init__(self, folder: Path, make_config: MakeConfig) -> None:
        self.config = make_config("tracking.mlflow=sqlite")
        self.run = RunFolder.create(self.config)
        self.database = folder / "mlflow.db"
        self.client = MlflowClient(f"sqlite:///{self.database}")

    def log(self, steps: Sequence[int], *, start: int = 0, then: Callable[..., Any] = int) -> None:
        """Rows of these steps, two at the last, as of a training that resumes from `start`."""
        with Tracker(self.run, self.config, start=start, environment={"a": "b"}) as tracker:
            for step in steps:
                tracker.log(step, {"loss/total": step / 7, "time/step": time.monotonic()})
            tracker.log(steps[-1], {"val/flow": 1.0, "time/step": 0.1})
            then()

    def runs(self) -> list[Any]:
        """Those that are not deleted."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return list(self.client.search_runs(experiments))

    def sent(self) -> Points:
        """The points of the only run."""
        (run,) = self.runs()
        assert run.info.run_id == read_state(self.run.path)["run_id"]
        keys = run.data.metrics
        histories = (self.client.get_metric_history(run.info.run_id, key) for key in keys)
        return Counter((m.key, m.step) for history in histories for m in history)

    def written(self) -> Points:
        """The points of metrics.jsonl."""
        rows = read_rows(self.run.metrics)
        return Counter((k, int(r["step"])) for r in rows for k in r.keys() - {"step", "time"})


@pytest.fixture
def output(put_database: Callable[[Path], Path], make_config: MakeConfig, tmp_path: Path) -> Output:
    put_database(tmp_path)
    return Output(tmp_path, make_config)


def replace(
    patch: pytest.MonkeyPatch, name: str, calls: set[int], error: BaseException, *, after: bool
) -> None:
    """Lets some calls of a method of the client fail, before it does its work or after."""
    original, count = getattr(MlflowClient, name), iter(range(1000))

    def failing(self: MlflowClient, *args: Any, **settings: Any) -> Any:
        fails = next(count) in calls
        if fails and not after:
            raise error
        result = original(self, *args, **settings)
        if fails:
            raise error
        return result

    patch.setattr(MlflowClient, name, failing)


@pytest.mark.usefixtures("without_rest")
@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize("name", ["create_experiment", "create_run", "log_batch"])
def test_after_an_outage_each_row_is_there_once(
    name: str,
    after: bool,
    output: Output,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    error = MlflowException("API request failed: Connection refused")
    replace(monkeypatch, name, {0, 1, 3, 5, 6}, error, after=after)
    output.log(range(9))
    assert output.sent() == output.written()
    assert output.runs()[0].info.status == "FINISHED"
    assert output.runs()[0].data.params["optim.lr"] == "0.001"
    outages = caplog.text.count("connection refused: nothing is lost")
    assert outages == caplog.text.count("answers again") > 0
    assert "alignlab track" not in caplog.text


@pytest.mark.usefixtures("without_rest")
@pytest.mark.parametrize("name", ["create_run", "log_batch"])
def test_after_a_kill_no_run_is_left_open_and_no_row_is_there_twice(
    name: str, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Tracker, "__exit__", lambda *_: None)  # a kill ends nothing
        replace(patch, name, {0} if name == "create_run" else {5}, Killed(), after=True)
        output.log(range(9))
    assert output.runs()[0].info.status == "RUNNING"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Tracker, "__exit__", lambda *_: None)
        output.log(range(3, 9), start=2, then=killed)  # after all rows
    output.log(range(7, 9), start=6)
    assert output.sent() == output.written()
    assert [run.info.status for run in output.runs()] == ["FINISHED"]


@pytest.mark.usefixtures("without_rest")
@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_somebody_deletes_is_made_again(what: str, output: Output) -> None:
    def delete() -> None:
        (run,) = output.runs()
        if what == "run":
            output.client.delete_run(run.info.run_id)
        else:
            output.client.delete_experiment(run.info.experiment_id)

    output.log(range(4), then=delete)
    assert send_run(output.run.path)
    assert output.sent() == output.written()
    address = runs_address(output.run.path, output.config)
    experiment = 1 if what == "run" else 2
    assert address is not None and address.endswith(f"/#/experiments/{experiment}/runs")


def test_a_run_that_was_left_is_closed(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "__exit__", lambda *_: None)
        output.log(range(4))
    assert output.runs()[0].info.status == "RUNNING"
    assert send_run(output.run.path)
    assert output.runs()[0].info.status == "KILLED"
    assert output.sent() == output.written()


def test_an_experiment_that_another_process_makes_meanwhile(
    output: Output, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output.client.create_experiment("run", artifact_location=output.run.path.as_uri())
    find, answers = MlflowClient.get_experiment_by_name, iter([None])

    def late(self: MlflowClient, name: str) -> Any:
        return next(answers, find(self, name))

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    output.log([1])
    assert output.sent() == output.written() and caplog.text == ""
    assert len(output.client.search_experiments()) == 2  # with MLflow's own


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"run_id": 3, "a": "b"}', None])
@pytest.mark.parametrize("name", [STATE, TAGS])
def test_a_damaged_file_of_the_run_is_told(
    name: str, content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tags(tmp_path, {"a": "b"})
    write_json(tmp_path / STATE, {"run_id": "c", ENDED: "FINISHED"})
    path, read = tmp_path / name, read_state if name == STATE else read_tags
    assert read(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'": "', b'": "x') if content is None else content)
    assert read(tmp_path) == {}
    assert f"{path} is damaged" in caplog.text
    write_tags(tmp_path, {"d": "e"})
    assert read_tags(tmp_path) == {"d": "e"}


@pytest.mark.usefixtures("without_rest")
@pytest.mark.parametrize(
    ("error", "is_final"),
    [(ReadTimeout("timed out"), False), (PermissionError(13, "not yours"), True)],
    ids=["slow", "refused"],
)
def test_files_that_were_not_taken_are_sent_later_unless_none_are_taken(
    error: OSError,
    is_final: bool,
    output: Output,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("alignlab.tracking.connection._connections", {})
    replace(monkeypatch, "log_artifact", {0}, error, after=False)
    output.log(range(2))
    (run,) = output.runs()
    assert run.info.status == "FINISHED"
    assert ("takes no files" in caplog.text) == is_final
    assert ("`alignlab track" in caplog.text) != is_final
    assert (ENDED in read_state(output.run.path)) == is_final
    assert send_run(output.run.path)
    files = [] if is_final else ["recipe.yaml"]
    assert [file.path for file in output.client.list_artifacts(run.info.run_id)] == files
    assert ENDED in read_state(output.run.path)


@pytest.mark.parametrize(
    ("error", "status"),
    [(EndedEarlyError(), "KILLED"), (KeyboardInterrupt(), "KILLED"), (ValueError(), "FAILED")],
)
def test_the_status_says_whether_an_end_was_meant(
    error: BaseException, status: str, output: Output
) -> None:
    def ended() -> None:
        raise error

    with pytest.raises(type(error)):
        output.log(range(2), then=ended)
    assert output.runs()[0].info.status == status


def test_processes_that_open_the_run_of_a_folder_at_once_have_one(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = MlflowClient.create_run

    def slow(*given: Any, **settings: Any) -> Any:
        time.sleep(0.2)
        return create(*given, **settings)

    monkeypatch.setattr(MlflowClient, "create_run", slow)
    way = Connection(f"sqlite:///{output.database}")
    runs = [
        MlflowRun(output.run.path, way, experiment="e", name="parent", tags={}) for _ in range(2)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda run: run.open(output.client), runs))
    assert [run.info.run_id for run in output.runs()] == [runs[0].run_id]
    assert runs[1].run_id == runs[0].run_id


@pytest.mark.usefixtures("without_rest")
def test_an_outage_at_the_first_rows(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "log_batch", {1}, MlflowException("away"), after=False)
    with Tracker(output.run, output.config, start=0, environment={}) as tracker:
        tracker.log(0, {"loss/total": 1.0})  # the same row comes first when it is read again
    assert output.sent() == output.written()


def test_few_requests(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    for name in (n for n in dir(MlflowClient) if not n.startswith("_")):
        original = getattr(MlflowClient, name)

        def counting(self: Any, *a: Any, _f: Any = original, _n: str = name, **k: Any) -> Any:
            calls[_n] += 1
            return _f(self, *a, **k)

        if callable(original):
            monkeypatch.setattr(MlflowClient, name, counting)
    ask(output.config)
    with Tracker(output.run, output.config, start=0, environment={}):
        assert len(output.runs()[0].data.params) > 60
    del calls["search_experiments"]  # of this test
    assert calls["log_batch"] == 1 and calls["log_param"] == 0
    assert calls.total() <= 12, calls


@pytest.mark.usefixtures("without_rest")
@pytest.mark.parametrize(
    "alias",
    ["dino v2 (b)", "a" * 240, "a" * 300, "β", "%", "..", "a//b", "a b", "x:y", "ra=1", "/"],
)
def test_any_alias_is_a_name_for_mlflow(alias: str, output: Output) -> None:
    with Tracker(output.run, output.config, start=0, environment={}) as tracker:
        tracker.log(1, {f"loss/{alias}": 1.0, f"loss/{alias}x/pull": 2.0})
        tracker.log(1, {alias: 3.0})
    assert output.sent().total() == 3
    assert len(tracked_name(f"loss/{alias}")) <= MAX_NAME
    assert tracked_name("loss/dino v2 (b)") == "loss/dino v2 _x28_b_x29_"
    assert tracked_name("loss/ra/pull") == "loss/ra/pull"


def test_a_training_without_its_server_is_sent_later(
    make_config: MakeConfig,
    put_database: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("alignlab.tracking.connection._connections", {})  # of earlier commands
    folder = train(make_config("steps=2", f"tracking.mlflow={NOWHERE}"))
    assert RunFolder(folder).read_result() is not None
    assert caplog.text.count("connection refused: nothing is lost") == 1
    assert caplog.text.index("connection refused") < caplog.text.index("alignlab track")
    put_database(tmp_path)
    for _ in range(2):
        assert send_run(folder, to="sqlite")
    output = Output(tmp_path, make_config)
    assert output.sent() == output.written() and output.written().total() > 50
    (run,) = output.runs()
    assert run.info.status == "FINISHED" and run.data.tags["alignlab.seed"] == "0"
    artifacts = {file.path for file in output.client.list_artifacts(run.info.run_id)}
    assert artifacts == {"recipe.yaml", "result.json", "model_card.md"}


def test_a_slow_server_gets_a_twentieth_of_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = [0.0]
    monkeypatch.setattr("alignlab.tracking.connection.time.monotonic", lambda: clock[0])
    way = Connection(f"sqlite:///{tmp_path / 'mlflow.db'}")
    way._client = object()
    waited = 0.0

    def slow(client: Any) -> None:
        nonlocal waited
        clock[0] += 3.0
        waited += 3.0

    for _ in range(3600):
        clock[0] += 1.0
        way.attempt(slow, when=PACED)
    assert 100 < waited < 3600 / 15
