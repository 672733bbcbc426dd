"""Files need not reach the disk: no test cuts the power, and SQLite waits for the disk for long."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine


@pytest.fixture(scope="session", autouse=True)
def unsynced_files() -> Iterator[None]:
    """Neither alignlab nor the databases of MLflow and Optuna wait until the disk has a file."""
    with pytest.MonkeyPatch.context() as patch, _listening():
        patch.setattr(os, "fsync", lambda number: None)
        yield


@contextmanager
def _listening() -> Iterator[None]:
    event.listen(Engine, "connect", _never_sync)
    yield
    event.remove(Engine, "connect", _never_sync)


def _never_sync(connection: Any, record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        with suppress(sqlite3.Error):  # of a file that is no database: whoever opened it meets it
            connection.execute("PRAGMA synchronous = OFF")
