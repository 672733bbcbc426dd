"""The table of operations: what a list of all kernels asks."""

from typing import Any

from alignlab.kernels import pull_push, relation
from alignlab.kernels.dispatch import Operation

OPERATIONS: dict[str, Operation[Any]] = {
    "pull_push": pull_push.OPERATION,
    "relation": relation.OPERATION,
}
