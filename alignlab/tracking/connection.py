"""MLflow at an address. It may be away or slow: that ends no training, and holds none up for long.

A call that fails is told once, until one succeeds again. During training, none follows another for
`SHARE` times as long as that took, and after a failure for at least `REST_S`: so MLflow takes no
more than a twentieth of a training's time, whatever it does.
"""

import errno
import json
import logging
import math
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from alignlab.config.parts import TrainingConfig
from alignlab.config.paths import expanded_url, sqlite_url, user_path
from alignlab.errors import first_line, printable
from alignlab.passwords import without_password
from alignlab.tracking.database import make_whole

log = logging.getLogger(__name__)

SHARE = 19.0
REST_S = 10.0
LONGEST_REST_S = 300.0
# Unless the environment says otherwise. With MLflow's own settings a call may wait for minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # to create a run twice would leave one open for ever
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no network unless asked
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # `runs_address` is printed
}
CONNECT_S = 5

When = Literal["paced", "unless_away", "now"]
PACED: When = "paced"
UNLESS_AWAY: When = "unless_away"
NOW: When = "now"

Work = Callable[[Any], object]
"""What is done with MLflow's client; may be done again after it failed half-way."""


class Connection:
    """The way to MLflow at one address, for one process.

    Args:
        uri: as MLflow takes it.
        database: its file, in an output folder, where no other program keeps anything; None: the
            user named the place.
    """

    def __init__(self, uri: str, database: Path | None = None) -> None:
        self.uri = uri
        self._own_database = database
        self._client: Any = None
        self._failures = 0  # since the last call that succeeded
        self._not_before = 0.0
        self._takes_no_files = False

    @property
    def is_away(self) -> bool:
        """Whether the last call failed."""
        return self._failures > 0

    def attempt(self, work: Work, *, when: When = UNLESS_AWAY) -> bool:
        """Does something with MLflow's client, or tells once that it could not be done.

        Args:
            work: gets the client.
            when: to do nothing: `paced`, before a call is due; `unless_away`, before one is due
                after a failure; `now`, never.

        Returns:
            Whether it was done.
        """
        if time.monotonic() < self._not_before and (
            when == PACED or (when == UNLESS_AWAY and self.is_away)
        ):
            return False
        begin = time.monotonic()
        try:
            if self._client is None:
                self._client = self._connect()
                begin = time.monotonic()  # to import MLflow and make its tables takes seconds, once
            work(self._client)
        except _failures() as error:
            self._client = None  # whether the database is whole is asked anew
            self._failures += 1
            if self._failures == 1:
                log.warning(
                    "MLflow at %s: %s: nothing is lost, metrics.jsonl has every row; they are sent "
                    "when it answers",
                    *(self.shown, _reason(error)),
                )
            rest = min(REST_S * 2.0 ** (self._failures - 1), LONGEST_REST_S)
            self._rest(max(rest, SHARE * (time.monotonic() - begin)))
            return False
        if self._failures:
            log.info("MLflow at %s answers again", self.shown)
        self._failures = 0
        self._rest(SHARE * (time.monotonic() - begin))
        return True

    def upload(
        self,
        work: Callable[[Any, Iterable[Path]], object],
        files: Iterable[Path],
        *,
        until: float = math.inf,
    ) -> bool:
        """Adds files to a run; a place that takes none is told once, and not asked again.

        Args:
            work: gets the client and the files, one at a time.
            files: to add.
            until: none is begun then or later, as `time.monotonic()` counts.

        Returns:
            Whether MLflow has all files that it takes.
        """
        return all(
            time.monotonic() < until and self.add(partial(_with_file, work, file)) for file in files
        )

    def add(self, work: Work) -> bool:
        """As `upload`, of one file; it gets the client."""
        if self._takes_no_files:
            return True

        def add(client: Any) -> None:
            try:
                work(client)
            except _failures() as error:
                if not _takes_no_files(error):
                    raise
                self._takes_no_files = True
                log.warning("MLflow at %s takes no files: %s", self.shown, _reason(error))

        return self.attempt(add, when=NOW)

    @property
    def shown(self) -> str:
        """The address without a password."""
        return without_password(self.uri)

    @property
    def artifacts(self) -> str | None:
        """Where the files of new experiments go; None where a server decides."""
        database = self._database()
        return None if database is None else database.with_name("mlartifacts").as_uri()

    def lies_in(self, output: Path) -> bool:
        """Whether it is the database of this output folder, which is copied and moved with it."""
        return self._own_database is not None and self._own_database.parent == output

    def runs_address(self, experiment_id: str) -> str:
        """Where a browser shows the runs of an experiment, in words."""
        path = f"/#/experiments/{experiment_id}/runs"
        if self.uri.startswith("http"):
            return f"{self.shown.rstrip('/')}{path}"
        if "://" in self.uri and not self.uri.startswith(("databricks", "uc")):
            return f"mlflow ui --backend-store-uri '{self.shown}', then http://127.0.0.1:5000{path}"
        return f"{self.shown}, experiment {experiment_id}"

    def _rest(self, seconds: float) -> None:
        self._not_before = time.monotonic() + seconds

    def _connect(self) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        database = self._database()
        if database is not None:
            make_whole(database, own=self._own_database is not None)
        elif re.match(r"(postgresql|mysql|mssql)", self.uri):
            _probe(self.uri)
        return MlflowClient(self.uri)

    def _database(self) -> Path | None:
        """The SQLite file of the address, if it is one."""
        if self._own_database is not None or not self.uri.startswith("sqlite"):
            return self._own_database
        from sqlalchemy.engine import make_url

        file = make_url(self.uri).database
        return Path(file).resolve() if file and file != ":memory:" else None


_connections: dict[str, Connection] = {}


def connection(config: TrainingConfig) -> Connection | None:
    """The way to the MLflow that a recipe names; None with `tracking.mlflow: none`.

    It is one for all trainings of this process: what one finds away, the next need not ask.
    """
    place = config.tracking.mlflow
    if place == "none":
        return None
    if place == "sqlite":
        database = user_path(config.output).resolve() / "mlflow.db"
        made = Connection(sqlite_url(database), database)
    else:
        made = Connection(expanded_url(place))
    return _connections.setdefault(made.uri, made)


def _with_file(work: Callable[[Any, Iterable[Path]], object], file: Path, client: Any) -> None:
    work(client, (file,))


def _probe(uri: str) -> None:
    """Asks a database server once; MLflow itself asks ten times, for minutes."""
    import sqlalchemy

    name = "timeout" if uri.startswith("mssql") else "connect_timeout"
    engine = sqlalchemy.create_engine(
        uri, poolclass=sqlalchemy.NullPool, connect_args={name: CONNECT_S}
    )
    engine.connect().close()


def _failures() -> tuple[type[Exception], ...]:
    """What MLflow raises where it is away, slow, or another program than MLflow."""
    from google.protobuf.json_format import Error
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (
        MlflowException,
        SQLAlchemyError,
        sqlite3.Error,
        Error,
        json.JSONDecodeError,
        OSError,
        ModuleNotFoundError,  # a database's driver
    )


def _takes_no_files(error: Exception) -> bool:
    """Whether an upload failed as every other would; else it may succeed later."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, ModuleNotFoundError | PermissionError):  # a store's client; its folder
        return True
    response = getattr(error, "response", None)  # of requests, an OSError
    if response is not None:
        is_disabled = response.status_code == 503 and "--no-serve-artifacts" in response.text
        return is_disabled or response.status_code in (403, 404, 405, 501)
    if isinstance(error, MlflowException):
        is_unknown = "registered artifact repository" in str(error)  # an address of another kind
        return is_unknown or error.error_code in ("PERMISSION_DENIED", "NOT_IMPLEMENTED")
    return isinstance(error, OSError) and error.errno == errno.EROFS


def _reason(error: Exception) -> str:
    """One line of an error, without what MLflow says around it."""
    text = without_password(first_line(error))
    short = r"Connection refused|Connection reset|timed out|Failed to resolve|No route to host"
    known = re.search(short, str(error))
    return known[0].lower() if known else printable(text[:300])
