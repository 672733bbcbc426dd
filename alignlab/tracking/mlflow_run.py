"""MLflow's run of a folder: found again after any kill, filled from `metrics.jsonl`.

`mlflow.json` in the folder holds a key, written before the run is created and tagged with it: a
process killed between the two leaves a run that the next one finds. MLflow itself is asked which
rows it has, so that none is sent twice, whatever was killed or timed out; and a row that is sent
again nevertheless has the same time, by which MLflow's databases know it.
"""

import logging
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from alignlab.passwords import without_password
from alignlab.progress import tell_once
from alignlab.runs.checksums import DamagedError, read_json, without_checksum_line, write_json
from alignlab.runs.file_lock import file_lock
from alignlab.runs.metric_rows import read_rows
from alignlab.tracking.connection import Connection
from alignlab.tracking.names import mlflow_tags, tracked_name
from alignlab.tracking.points import metric_names, points
from alignlab.tracking.run_content import DatasetFacts

log = logging.getLogger(__name__)

STATE = "mlflow.json"
TAGS = "mlflow_tags.json"
OLD_ID = "mlflow_run_id"  # file of older versions, which holds the run's id alone
LOCK = ".mlflow.lock"  # also in `START_FILES` of a run folder
ENDED = "ended"
KEY = "alignlab.key"
FOLDER = "folder"  # that `mlflow.json` was written for
CHANGED = "alignlab.changed."  # begins the tag of a setting that is another one since a resume
RECIPE_HASH = "alignlab.recipe_hash"
PARENT = "mlflow.parentRunId"
MAX_RUN_NAME = 250
MOST_METRICS = 1000  # in a request
TEXTS = (".yaml", ".csv")  # that quote settings and errors


class MlflowRun:
    """The run of a folder: of a training, or of what belongs together.

    Every method that takes MLflow's client may fail at any moment, and be called again.

    Args:
        folder: keeps its key and id; what `write_tags` wrote there is added to its tags.
        experiment: which one it is in; it is created if need be.
        name: what MLflow shows.
        tags: it gets them; also one that is there already.
        params: likewise; MLflow changes none, so another value of one becomes a tag.
        metrics: the file whose rows it has.
        anew: nothing of the folder is kept: a run of another recipe there is not this one.
        known_id: of the run, where an older version kept it elsewhere.
        locked: the caller holds `only_sender`.
    """

    def __init__(
        self,
        folder: Path,
        way: Connection,
        *,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, str] | None = None,
        metrics: Path | None = None,
        anew: bool = False,
        known_id: str = "",
        locked: bool = False,
    ) -> None:
        self._folder = folder
        self._way = way
        self._experiment = experiment
        self._name = name
        self._tags = dict(tags)
        self._params = dict(params or {})
        self._metrics = metrics
        self._anew = anew
        self._known_id = known_id
        self._locked = locked
        self._run_id = ""
        self._is_new = False
        self._known: dict[str, set[int]] = {}  # marker -> steps that MLflow has
        self._queue: deque[tuple[dict[str, float], str]] = deque()
        self._last_names: tuple[float, set[str]] = (-1, set())

    @property
    def run_id(self) -> str:
        """MLflow's id; empty while the run is not open."""
        return self._run_id

    @property
    def unsent(self) -> int:
        """Rows that are known and not sent."""
        return len(self._queue)

    def open(self, client: Any, status: str = "RUNNING") -> None:
        """Finds the run or creates it, with tags and params; nothing if it is open."""
        if self._run_id:
            return
        # several processes may have one parent
        with nullcontext() if self._locked else only_sender(self._folder):
            self._find_or_create(client, status)

    def add(self, row: Mapping[str, float]) -> None:
        """A row that was written after the run was opened; before, all are read from the file."""
        if self._run_id:
            self._append(row)

    def forget(self) -> None:
        """After a failure: what MLflow has is asked anew, and rows are read from the file."""
        self._run_id = ""
        self._queue.clear()

    def send(self, client: Any) -> None:
        """Sends rows that MLflow does not have, as many as fit into a request."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        sent: list[tuple[str, int]] = []
        taken = 0
        for row, marker in self._queue:
            step = int(row["step"])
            if step not in self._steps(client, marker):
                metrics = [
                    Metric(point.name, point.value, round(point.time_s * 1000), step)
                    for point in points(row, last=marker)
                ]
                if batch and len(batch) + len(metrics) > MOST_METRICS:
                    break
                batch += metrics
                sent.append((marker, step))
            taken += 1
        if batch:
            client.log_batch(self._run_id, metrics=batch)
        for marker, step in sent:
            self._known[marker].add(step)
        for _ in range(taken):
            self._queue.popleft()

    def set_metrics(self, client: Any, metrics: Mapping[str, float], when_s: float) -> None:
        """Final values of a run without rows of its own; again with the same time: no second."""
        from mlflow.entities import Metric

        final = [
            Metric(tracked_name(name), value, round(when_s * 1000), 0)
            for name, value in metrics.items()
        ]
        client.log_batch(self._run_id, metrics=final)

    def upload(self, client: Any, files: Iterable[Path]) -> None:
        """Adds files, those that are there, as artifacts; recipes without passwords in URLs.

        Those in a folder below the run's are in a folder of that name.
        """
        here = self._folder.resolve()
        for file in files:
            if not file.exists():
                continue
            name = file.name
            if file.resolve().is_relative_to(here):
                name = file.resolve().relative_to(here).as_posix()
            text = file.read_text("utf-8") if file.suffix in TEXTS else ""
            if without_password(text) == text:
                client.log_artifact(self._run_id, str(file), name.rpartition("/")[0] or None)
            else:
                shown = without_password(without_checksum_line(text))
                client.log_text(self._run_id, shown, name)

    def upload_text(self, client: Any, name: str, text: str) -> None:
        """Adds a file that lies nowhere on this machine."""
        client.log_text(self._run_id, without_password(text), name)

    def set_datasets(self, client: Any, datasets: Iterable[DatasetFacts]) -> None:
        """Says what the run was trained on; again the same: no second."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training")]
        inputs = []
        for facts in datasets:
            name, source = tracked_name(facts.name), without_password(facts.source)
            inputs.append(DatasetInput(Dataset(name, facts.digest, "alignlab", source), tags))
        client.log_inputs(self._run_id, datasets=inputs)

    def close(self, client: Any, status: str, *, complete: bool = True) -> None:
        """Ends it: `FINISHED`, `FAILED` or `KILLED`.

        Args:
            client: of MLflow.
            status: of the run.
            complete: it has its files, too; else it counts as not ended.
        """
        client.set_terminated(self._run_id, status)
        self._run_id = ""
        if complete and not self._queue:
            write_json(self._folder / STATE, read_state(self._folder) | {ENDED: status})

    def _find_or_create(self, client: Any, status: str) -> None:
        state, here = read_state(self._folder), self._folder.resolve()
        key, run_id = state.get("key"), state.get("run_id", self._known_id)
        written_for = state.get(FOLDER)
        if written_for is not None and self._is_copy_of(Path(written_for), key):
            key, run_id = None, ""
        run = self._found(client, run_id, key)
        if run is not None and written_for is None:  # of an older version
            named = here.parents[self._name.count("/")] / str(run.info.run_name)
            if self._is_copy_of(named, key):
                run = key = None
        key = key or uuid.uuid4().hex
        tags = self._tags | read_tags(self._folder)
        if run is not None and self._anew and self._is_other(run):
            client.set_terminated(run.info.run_id, "KILLED")
            run, key = None, uuid.uuid4().hex
        self._is_new = run is None
        name, own = self._name[:MAX_RUN_NAME], {FOLDER: str(here)}
        if run is None:
            write_json(self._folder / STATE, {"key": key, **own})
            experiment = experiment_id(client, self._experiment, self._way)
            run = client.create_run(experiment, run_name=name, tags=mlflow_tags(tags | {KEY: key}))
        elif written_for not in (None, str(here)):  # it was moved
            client.update_run(run.info.run_id, status=status, name=name)
        elif run.info.status != status:
            client.update_run(run.info.run_id, status=status)
        ids = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id}
        write_json(self._folder / STATE, {"key": key, **ids, **own})
        self._complete(client, run, tags | {KEY: key})
        self._known.clear()
        self._queue.clear()
        self._last_names = (-1, set())
        if self._metrics is not None:
            for row in read_rows(self._metrics):
                self._append(row)
        self._run_id = str(run.info.run_id)

    def _is_copy_of(self, other: Path, key: str | None) -> bool:
        """Whether this folder was copied from another one, which has its run; that is told.

        Where the other one is gone, this one was moved, and its run goes with it.
        """
        here = self._folder.resolve()
        output = here.parents[self._name.count("/")]
        if not (other / STATE).exists() or other.samefile(here):
            return False
        if self._way.lies_in(output) and not other.is_relative_to(output):
            return False  # the database was copied as well
        if key is None or read_state(other).get("key") != key:
            return False
        tell_once(f"{self._folder} is a copy of {other}: MLflow gets a run of its own for it")
        if read_tags(here).get(PARENT) == read_tags(other).get(PARENT):
            (here / TAGS).unlink(missing_ok=True)  # the other one's place; a parent writes its own
        return True

    def _found(self, client: Any, run_id: str, key: str | None) -> Any:
        """The run of this folder, unless somebody deleted it."""
        from mlflow.exceptions import MlflowException

        if run_id:
            try:
                run = client.get_run(run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if key is None:  # so no run has it
            return None
        experiment = experiment_id(client, self._experiment, self._way)
        found = client.search_runs([experiment], filter_string=f"tags.`{KEY}` = '{key}'")
        for run in found[:-1]:  # of a request that was repeated
            client.set_terminated(run.info.run_id, "KILLED")
        return found[-1] if found else None  # the first that was created

    def _is_other(self, run: Any) -> bool:
        """Whether it is of a recipe that had the folder before, and trained no step."""
        return bool(run.data.tags.get(RECIPE_HASH) != self._tags.get(RECIPE_HASH))

    def _complete(self, client: Any, run: Any, tags: Mapping[str, str]) -> None:
        """Adds the tags and params that the run lacks, in one request if they are below 100."""
        from mlflow.entities import Param, RunTag

        there = run.data.params
        params = [Param(key, value) for key, value in self._params.items() if key not in there]
        changed = {
            f"{CHANGED}{key}": value
            for key, value in self._params.items()
            if there.get(key, value) != value
        }
        wanted = mlflow_tags({**tags, **changed})
        missing = [
            RunTag(key, value) for key, value in wanted.items() if run.data.tags.get(key) != value
        ]
        client.log_batch(run.info.run_id, params=params, tags=missing)

    def _steps(self, client: Any, marker: str) -> set[int]:
        """Steps at which MLflow has a metric."""
        if marker not in self._known:
            history = []
            if not self._is_new:
                history = client.get_metric_history(self._run_id, tracked_name(marker))
            self._known[marker] = {metric.step for metric in history}
        return self._known[marker]

    def _append(self, row: Mapping[str, float]) -> None:
        """Queues a row with its marker: the first name that no earlier row of its step has."""
        names = metric_names(row)
        step, earlier = self._last_names
        if step != row["step"]:
            earlier = set()
        marker = next((name for name in names if name not in earlier), None)
        self._last_names = (row["step"], earlier | set(names))
        if marker is not None:
            self._queue.append((dict(row), marker))


@contextmanager
def only_sender(folder: Path) -> Iterator[None]:
    """Holds the lock of the process that opens a folder's run, or sends it as a whole.

    Raises:
        UserError: the filesystem has no locks.
    """
    waiting = f"waiting for the process that sends {folder} to MLflow"
    with file_lock(folder / LOCK, waiting=lambda: waiting):
        yield


def read_state(folder: Path) -> dict[str, str]:
    """What a folder knows of its run: `key`, `folder`, `run_id`, `experiment_id`, or less.

    And `ended`, the status that MLflow was told after all rows.
    """
    path, old = folder / STATE, folder / OLD_ID
    if path.exists():
        return _read(path, f"MLflow's run of {folder} is not known by it")
    return {"run_id": old.read_text().strip()} if old.exists() else {}


def _read(path: Path, lost: str) -> dict[str, str]:
    """Texts by name; of a damaged file none, which is told: no training ends for that."""
    try:
        content = read_json(path, fix=lost)
        if not all(isinstance(value, str) for value in content.values()):
            raise DamagedError(path, "it holds more than texts", lost)
    except DamagedError as error:
        log.warning("%s", error)
        return {}
    return content


def write_tags(folder: Path, tags: Mapping[str, str]) -> None:
    """Gives the run of a folder further tags, such as its parent; the folder need not exist.

    MLflow gets them when the run is opened next: it counts as not ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if read_tags(folder) == dict(tags):
        return
    write_json(folder / TAGS, tags)
    state = read_state(folder)
    if state.pop(ENDED, None) is not None:
        write_json(folder / STATE, state)


def read_tags(folder: Path) -> dict[str, str]:
    """What `write_tags` wrote."""
    path = folder / TAGS
    if not path.exists():
        return {}
    return _read(path, "what the run is a part of is not known until that is continued")


def experiment_id(client: Any, name: str, way: Connection) -> str:
    """Id of the experiment of this name; it is created if need be.

    Beside one that was deleted, `NAME (2)` takes its place: MLflow gives a name once.
    """
    from mlflow.exceptions import MlflowException

    number, wanted = 1, name
    while True:
        found = client.get_experiment_by_name(wanted)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        if found is None:
            try:
                return str(client.create_experiment(wanted, artifact_location=way.artifacts))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(wanted)  # another process was faster
            if found is not None and found.lifecycle_stage == "active":
                return str(found.experiment_id)
        number += 1
        wanted = f"{name} ({number})"
