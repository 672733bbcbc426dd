"""A database of MLflow that takes a second to make, and is copied."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.tracking import connection as module
from alignlab.tracking.database import make_whole

PutDatabase = Callable[[Path], Path]


@pytest.fixture(scope="session")
def made_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one without runs."""
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make_whole(database, own=True)
    return database


@pytest.fixture
def put_database(made_database: Path) -> PutDatabase:
    """`put_database(folder)` puts such a one into a folder and gives its path."""

    def put(folder: Path) -> Path:
        return Path(shutil.copy(made_database, folder / "mlflow.db"))

    return put


@pytest.fixture
def without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is asked again at once after a failure."""
    monkeypatch.setattr(module, "REST_S", 0.0)
    monkeypatch.setattr(module, "SHARE", 0.0)
