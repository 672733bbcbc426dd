"""MLflow's tables, made once and copied: its fifty migrations take seconds."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from alignlab.tracking import database as module


@pytest.fixture(scope="module", autouse=True)
def copied_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """New databases are copies of the first one of this session; all else about them is real.

    Tests about databases have a fixture of this name that does nothing.
    """
    with copying(tmp_path_factory.getbasetemp() / "first-mlflow.db"):
        yield


@contextmanager
def copying(first: Path) -> Iterator[None]:
    """Within it, a new database is a copy of `first`, which is made if it is not there."""
    migrate = module._migrate

    def copy(new: Path, database: Path) -> None:
        if new.exists():  # it holds what an older MLflow left
            migrate(new, database)
            return
        if first.exists():
            shutil.copy(first, new)
        else:
            migrate(new, database)
            unfinished = first.with_suffix(f".{os.getpid()}")
            shutil.copy(new, unfinished)
            os.replace(unfinished, first)
        with closing(sqlite3.connect(new)) as tables, tables:
            tables.execute("UPDATE experiments SET artifact_location = ?", [artifacts(database)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_migrate", copy)
        yield


def artifacts(database: Path) -> str:
    """Where the default experiment of a new database keeps its files."""
    return f"{database.with_name('mlartifacts').as_uri()}/0"
