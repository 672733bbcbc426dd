"""The table of operations, and what other packages add to it: what a list of all kernels asks."""

from functools import cache
from typing import Any

from alignlab.kernels import local_gram, pull_push, relation
from alignlab.kernels.dispatch import Operation
from alignlab.kernels.plugins import Installed, load_kernels

OPERATIONS: dict[str, Operation[Any]] = {
    "pull_push": pull_push.OPERATION,
    "relation": relation.OPERATION,
    "local_gram": local_gram.OPERATION,
}


@cache
def installed_kernels() -> tuple[Installed, ...]:
    """Loads what other packages register, once; those that cannot be used have a problem."""
    references = {name: operation.table["eager"] for name, operation in OPERATIONS.items()}
    return tuple(load_kernels(references))
