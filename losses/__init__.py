"""Alignment objectives. Their formulas, defaults and sources are in README.md beside this file."""

from alignlab.losses import registry as _registry
from alignlab.losses.objective import Objective as _Objective
from alignlab.losses.registry import build_objective as build_objective

OBJECTIVES: dict[str, type[_Objective]]


def __getattr__(name: str) -> dict[str, type[_Objective]]:
    # Not imported above: see `alignlab.losses.registry.OBJECTIVES`.
    if name == "OBJECTIVES":
        return _registry.OBJECTIVES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
