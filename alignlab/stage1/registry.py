"""The table of Stage 1 tasks. To add one: a file, a row, and its network in `losses/stage1`."""

from typing import Any

from alignlab.stage1.moalign import MoAlignTask
from alignlab.stage1.sara import SaraTask
from alignlab.stage1.task import Stage1Task

STAGE1_TASKS: dict[str, type[Stage1Task[Any]]] = {
    "sara": SaraTask,
    "moalign": MoAlignTask,
}
"""By the `kind` of the recipe's `stage1`."""
