"""The SQLite file under MLflow: there whole or not at all.

MLflow makes its tables in some fifty migrations, which SQLite cannot take back: a process killed
in that second leaves a file that no later MLflow opens. So it is made under another name, and moved
into place when it is whole.
"""

import logging
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from alignlab.config.paths import sqlite_url
from alignlab.runs.file_lock import file_lock

log = logging.getLogger(__name__)

BUSY_S = 60.0  # that another process may take to write
SIDE_FILES = ("-journal", "-wal", "-shm")  # of a transaction that is not finished
NEW = ".new"
HALF_MIGRATED = "_alembic_tmp_"  # begins the name of a table that a migration was rewriting
VERSION = "alembic_version"


def make_whole(database: Path, *, own: bool) -> None:
    """Makes the database if it is not there, and again if it cannot be used; one process at a time.

    What cannot be used is renamed, not removed, and a line in the log says so.

    Args:
        database: the file.
        own: no other program keeps anything there; else only what MLflow left half made is put
            aside.

    Raises:
        MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError: it cannot be made,
            or is not to be touched.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = database.with_name(f"{database.name}.lock")
    with file_lock(lock, waiting=lambda: f"waiting for the process that makes {database}"):
        if not database.exists():
            _make(database)
            return
        state = _look(database)
        if state.fault and (own or state.is_mlflows):
            aside = _put_aside(database)
            _make(database)
            held = "and kept, with what it holds" if state.has_runs else "and held no run"
            log.warning(
                "%s was no whole MLflow database (%s): it is called %s now %s; a new one is made",
                *(database, state.fault, aside.name, held),
            )
        elif state.is_older:
            _upgrade(database)


class _State(NamedTuple):
    """What is the matter with a database.

    Args:
        fault: why it cannot be used; empty if it can.
        is_mlflows: all its tables are MLflow's.
        has_runs: it keeps at least one.
        is_older: it is whole, and lacks tables that the installed MLflow would add.
    """

    fault: str = ""
    is_mlflows: bool = True
    has_runs: bool = False
    is_older: bool = False


def _look(database: Path) -> _State:
    try:
        with closing(sqlite3.connect(database, timeout=BUSY_S)) as connection:
            return _state(connection)
    except sqlite3.OperationalError:  # busy, or the machine's fault
        raise
    except sqlite3.DatabaseError as error:
        return _State(fault=str(error), is_mlflows=False, has_runs=True)


def _state(connection: sqlite3.Connection) -> _State:
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401  its tables join Base

    master = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' "
    tables = {name for (name,) in connection.execute(f"{master} ESCAPE '!'")}
    mlflows = set(Base.metadata.tables)
    foreign = {t for t in tables - mlflows if not t.startswith(("_alembic", "alembic"))}
    # an older MLflow may have tables that today's has not; those of a run it always had
    is_mlflows = not foreign or {"experiments", "runs", "metrics", "params", "tags"} <= tables
    has_runs = "runs" in tables and bool(
        connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone()
    )
    revisions = set()
    if VERSION in tables:
        revisions = {number for (number,) in connection.execute(f"SELECT * FROM {VERSION}")}
    fault = ""
    if any(table.startswith(HALF_MIGRATED) for table in tables):
        fault = "a migration of its tables was interrupted"
    elif not tables:
        fault = "it is empty"
    elif len(revisions) != 1 or (not has_runs and revisions != _heads()):
        fault = "the making of its tables was interrupted"
    is_older = not fault and not mlflows <= tables
    return _State(fault, is_mlflows, has_runs, is_older)


def _heads() -> set[str]:
    """The revision of the tables that the installed MLflow makes."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    (folder,) = db_migrations.__path__
    return set(ScriptDirectory(folder).get_heads())


def _make(database: Path) -> None:
    """Makes it under another name and moves it into place."""
    with _beside(database) as new:
        _migrate(new, database)
        # those of a database that somebody removed: SQLite would play them back
        _move_side_files(database, None)
        os.replace(new, database)


def _upgrade(database: Path) -> None:
    """Gives an older one, with what it holds, today's tables.

    A copy is migrated and written over it in one transaction. It stays the same file, so that a
    program that has it open goes on writing into it; what such a program writes while the copy is
    migrated is seen, and the copy made anew.
    """
    with closing(sqlite3.connect(database, timeout=BUSY_S)) as old:
        while True:
            with _beside(database) as new:
                version = _data_version(old)
                with closing(sqlite3.connect(new)) as copy:
                    old.backup(copy)
                _migrate(new, database)
                if _data_version(old) != version:
                    continue
                with closing(sqlite3.connect(new)) as migrated:
                    migrated.backup(old)
                return


def _data_version(connection: sqlite3.Connection) -> int:
    """Another number after another connection has written."""
    (version,) = connection.execute("PRAGMA data_version").fetchone()
    return int(version)


@contextmanager
def _beside(database: Path) -> Iterator[Path]:
    """The name of a file beside it, which is removed at the end."""
    for leftover in database.parent.glob(f".{database.name}.*{NEW}*"):
        leftover.unlink()  # of a process that was killed here
    # another name each time: MLflow keeps the connections that it has opened, by the file's name
    new = database.with_name(f".{database.name}.{uuid.uuid4().hex}{NEW}")
    try:
        yield new
    finally:
        new.unlink(missing_ok=True)
        _move_side_files(new, None)


def _migrate(new: Path, database: Path) -> None:
    """Gives the file `new` the tables of the installed MLflow, with the artifacts of `database`."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    artifacts = database.with_name("mlartifacts").as_uri()
    SqlAlchemyStore(sqlite_url(new), artifacts).engine.dispose()


def _put_aside(database: Path) -> Path:
    """Renames it and what belongs to it; gives the new name, which nothing had."""
    number = 1
    while (aside := database.with_name(f"{database.name}.unusable-{number}")).exists():
        number += 1
    _move_side_files(database, aside)
    os.replace(database, aside)
    return aside


def _move_side_files(database: Path, to: Path | None) -> None:
    """Renames the files of an unfinished transaction as a database is, or removes them."""
    for ending in SIDE_FILES:
        side = Path(f"{database}{ending}")
        if to is not None and side.exists():
            os.replace(side, f"{to}{ending}")
        side.unlink(missing_ok=True)
