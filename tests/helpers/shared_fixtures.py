"""The fixtures that tests of several folders ask for: a plugin of pytest, for who runs tests.

To import it takes seconds, which the process that only deals tests to workers does not spend.
"""

import pytest

from alignlab.progress import tell_once, warn_once
from few_charts import few_charts
from loaded_models import loaded_models
from mlflow_tables import copied_tables
from remembered_plans import remembered_plans
from shared_clips import shared_clips
from tiny_runs import (
    full_run,
    lora_run,
    make_config,
    recipe_file,
    teacher_folder,
    train_until,
)
from tiny_wan import wan_folder
from unsynced_files import unsynced_files

__all__ = [
    "copied_tables",
    "few_charts",
    "full_run",
    "loaded_models",
    "lora_run",
    "make_config",
    "recipe_file",
    "remembered_plans",
    "shared_clips",
    "teacher_folder",
    "train_until",
    "unsynced_files",
    "wan_folder",
]


@pytest.fixture(autouse=True)
def _nothing_is_told_yet() -> None:
    """Each test is a command of its own."""
    warn_once.cache_clear()
    tell_once.cache_clear()
