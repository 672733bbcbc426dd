"""A comparison in MLflow: a parent run, under which the runs of its variants are."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from alignlab.config.parts import TrainingConfig
from alignlab.config.run import RunConfig
from alignlab.experiments.launchers import RunKey
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking.connection import NOW, Connection, connection
from alignlab.tracking.mlflow_run import PARENT, MlflowRun, read_state, write_tags
from alignlab.tracking.other_trackers import check_packages
from alignlab.tracking.send import send_each_unless_ended
from alignlab.tracking.tracker import END_S, experiment_name, status_of, tell_unsent

VARIANT = "alignlab.variant"
FILES = (
    *("comparison.json", "report.html", "report.md"),
    *("table.csv", "table.tex", "steps.csv", "noise_floor.csv"),
)
FIGURES = "figures"


@contextmanager
def tracked(
    folder: Path, runs: Mapping[RunKey, RunConfig], folders: Mapping[RunKey, RunFolder]
) -> Iterator[None]:
    """Puts the runs under one of MLflow for a while, which gets the report's files at the end.

    Args:
        folder: of the comparison.
        runs: by variant and seed.
        folders: theirs; they exist.

    Raises:
        UserError: a tracker's package is not installed, and there is a run to be trained.
    """
    for key, run in runs.items():
        if not folders[key].result.exists():
            check_packages(run)
    parent = ParentRun(folder, next(iter(runs.values())))
    parent.begin({folders[key].path: {VARIANT: key[0]} for key in runs})
    try:
        yield
    except BaseException as error:
        parent.end(status_of(error))
        raise
    parent.end("FINISHED")


class ParentRun:
    """MLflow's run of a comparison; it does nothing with `tracking.mlflow: none`.

    Args:
        folder: of the comparison.
        run: any of its runs.
    """

    def __init__(self, folder: Path, run: TrainingConfig) -> None:
        self._folder = folder
        self._tags: Mapping[Path, Mapping[str, str]] = {}
        self.config = run
        self._way = connection(run)
        if self._way is not None:
            name = run.name.rsplit("/", 2)[0]  # NAME/VARIANT/seed-N
            self._run = MlflowRun(
                folder,
                self._way,
                experiment=experiment_name(run),
                name=name,
                tags={"alignlab.comparison": name},
            )

    def begin(self, tags: Mapping[Path, Mapping[str, str]]) -> None:
        """Opens it and tells the run folders.

        Args:
            tags: of each run, by its folder.
        """
        if self._way is None:
            return
        self._tags = tags
        with quiet_libraries():
            self._way.attempt(self._run.open)
        self._tell_children()

    def end(self, status: str, *, children: bool = True) -> bool:
        """Sends what MLflow lacks of the runs, adds the report's files and ends it.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`; the first has runs and files.
            children: false: the runs are sent by themselves.

        Returns:
            Whether MLflow has all of it.
        """
        if self._way is None:
            return True
        way, run = self._way, self._run
        with quiet_libraries():
            run.forget()  # it may have been deleted while the runs were trained
            is_open, has_all = way.attempt(run.open, when=NOW), True
            self._tell_children()
            if is_open and status == "FINISHED":
                has_all = not children or self._send_children(way)
                is_open = not way.is_away
            if is_open and status == "FINISHED":
                files = [self._folder / name for name in FILES]
                files += sorted((self._folder / FIGURES).glob("[!.]*"))
                has_all = way.upload(run.upload, files) and has_all
            complete = is_open and way.attempt(
                lambda client: run.close(client, status, complete=has_all), when=NOW
            )
            complete = complete and has_all
        if not complete:
            tell_unsent(way, self._folder)
        return complete

    def _tell_children(self) -> None:
        parent = read_state(self._folder).get("run_id")
        for child, own in self._tags.items():
            write_tags(child, {**own, **({PARENT: parent} if parent else {})})

    def _send_children(self, way: Connection) -> bool:
        place, until = self.config.tracking.mlflow, time.monotonic() + END_S
        return send_each_unless_ended(self._tags, way, to=place, until=until)
