"""The SQLite file under MLflow is whole or not there, whenever its maker is killed."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from alembic import command
from mlflow import MlflowClient
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base as FirstTables
from sqlalchemy import create_engine, event
from sqlalchemy.engine import Engine

from alignlab.config.paths import sqlite_url
from alignlab.recipe import load_run
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import Tracker
from alignlab.tracking import database as module
from alignlab.tracking.database import make_whole
from kills import die, fork
from processes import forked

PutDatabase = Callable[[Path], Path]

BEFORE_TRACES = "acf3f17fdcc7"  # a revision of MLflow's tables, of its version 2.12


@pytest.fixture(scope="module", autouse=True)
def copied_tables() -> None:
    """Here MLflow makes every database, else only the first one of a session."""


def change(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def first_tables(database: Path) -> None:
    database.unlink()
    engine = create_engine(sqlite_url(database))
    FirstTables.metadata.create_all(engine)
    engine.dispose()


# What a kill left of a database that MLflow made in place, or a disk of it.
HALF_MADE: dict[str, Callable[[Path], object]] = {
    "no byte": lambda path: path.write_bytes(b""),
    "the first tables": first_tables,
    "a table that was being rewritten": lambda path: change(
        path, "CREATE TABLE _alembic_tmp_experiments (x)"
    ),
    "no version": lambda path: change(path, "DELETE FROM alembic_version"),
    "an early version": lambda path: change(
        path, "UPDATE alembic_version SET version_num = '451aebb31d03'"
    ),
    "other bytes": lambda path: path.write_bytes(b"no database" * 100),
    "cut": lambda path: os.truncate(path, 20_000),
}


@pytest.mark.parametrize("state", HALF_MADE)
def test_a_half_made_database_is_put_aside_and_made_again(
    state: str,
    put_database: PutDatabase,
    made_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    database = put_database(tmp_path)
    HALF_MADE[state](database)
    before = database.read_bytes()
    monkeypatch.setattr(module, "_make", lambda path: put_database(path.parent))
    make_whole(database, own=True)
    assert database.read_bytes() == made_database.read_bytes()
    assert (tmp_path / "mlflow.db.unusable-1").read_bytes() == before
    assert caplog.text.count(f"{database} was no whole MLflow database") == 1
    make_whole(database, own=True)  # and it is left alone then
    assert caplog.text.count("whole") == 1


def test_a_database_with_runs_is_kept(
    put_database: PutDatabase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = put_database(tmp_path)
    client = MlflowClient(sqlite_url(database))
    run = client.create_run(client.create_experiment("mine"))
    for _ in range(2):
        make_whole(database, own=True)
    assert client.get_run(run.info.run_id).info.run_id and caplog.text == ""
    # what cannot be used any more is kept under another name
    change(database, "CREATE TABLE _alembic_tmp_runs (x)")
    make_whole(database, own=True)
    aside = tmp_path / "mlflow.db.unusable-1"
    with closing(sqlite3.connect(aside)) as connection:
        assert connection.execute("SELECT run_uuid FROM runs").fetchall() == [(run.info.run_id,)]
    assert "and kept, with what it holds" in caplog.text


def test_a_file_that_the_user_named_and_that_is_not_mlflows_is_left_alone(tmp_path: Path) -> None:
    notes, tables = tmp_path / "notes.txt", tmp_path / "tables.db"
    notes.write_text("no database\n" * 99)
    change(tables, "CREATE TABLE mine (x)", "CREATE TABLE alembic_version (version_num)")
    for path in (notes, tables):
        before = path.read_bytes()
        make_whole(path, own=False)
        assert path.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {
        "notes.txt",
        "tables.db",
    }


def test_a_process_that_is_killed_while_it_makes_one_leaves_none(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"

    def dies_at_statement_150() -> None:
        count = iter(range(150))

        def see(*_: object) -> None:
            if next(count, None) is None:
                die()

        event.listen(Engine, "after_cursor_execute", see)
        make_whole(database, own=True)

    fork("makes it", dies_at_statement_150, dies=True)
    assert not database.exists()
    (half,) = tmp_path.glob(".mlflow.db.*.new")
    assert half.stat().st_size > 0
    (tmp_path / "mlflow.db-journal").write_bytes(b"of a database that somebody removed")
    make_whole(database, own=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    client = MlflowClient(sqlite_url(database))
    (experiment,) = client.search_experiments()
    assert experiment.artifact_location == (tmp_path / "mlartifacts" / "0").as_uri()


def older_database(path: Path) -> None:
    """As an MLflow made it that had no traces yet, with a run."""
    engine = create_engine(sqlite_url(path))
    FirstTables.metadata.create_all(engine)
    command.upgrade(_get_alembic_config(sqlite_url(path)), BEFORE_TRACES)
    engine.dispose()
    change(path, "INSERT INTO runs (run_uuid, name, experiment_id) VALUES ('first', 'first', 0)")


def test_an_older_database_gets_todays_tables_and_keeps_what_is_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "mlflow.db"
    older_database(database)
    migrate, copies = module._migrate, []
    with closing(sqlite3.connect(database)) as other:

        def write_meanwhile(new: Path, path: Path) -> None:
            copies.append(new)
            if len(copies) == 1:
                other.execute("INSERT INTO runs (run_uuid, name) VALUES ('second', 'second')")
                other.commit()
            migrate(new, path)

        monkeypatch.setattr(module, "_migrate", write_meanwhile)
        make_whole(database, own=True)
        assert len(copies) == 2 and "whole" not in caplog.text
        # a program that has it open goes on writing into it
        other.execute("INSERT INTO runs (run_uuid, name) VALUES ('third', 'third')")
        other.commit()
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT run_uuid FROM runs ORDER BY rowid").fetchall()
        tables = connection.execute("SELECT name FROM sqlite_master WHERE name = 'trace_info'")
        assert [name for (name,) in rows] == ["first", "second", "third"]
        assert tables.fetchall()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_runs_that_start_at_once_share_a_new_database(tmp_path: Path) -> None:
    names = ["one", "two", "three"]

    def start(name: str) -> None:
        config = load_run("tiny", [f"output={tmp_path}", f"name={name}"])
        with Tracker(RunFolder.create(config), config, start=0, environment={}) as tracker:
            tracker.log(1, {"loss/total": 1.0})

    # forked, so that everything is imported once and they meet at the database
    children = [forked(partial(start, name)) for name in names]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = client.search_experiments(filter_string="name != 'Default'")
    assert sorted(e.name for e in experiments) == sorted(names)
