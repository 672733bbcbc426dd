"""Comparisons, sweeps and reports; the room that runs the harness many times.

`load_comparison`, `load_sweep` and `load_run` give the results in a folder as data
(docs/results.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # pandas and all that reads results take seconds to import
    from alignlab.experiments.analysis.comparison import load_comparison as load_comparison
    from alignlab.experiments.analysis.run import load_run as load_run
    from alignlab.experiments.analysis.sweep import load_sweep as load_sweep

_LOADERS = {"load_comparison": "comparison", "load_run": "run", "load_sweep": "sweep"}


def __getattr__(name: str) -> Any:
    if name not in _LOADERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.analysis.{_LOADERS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LOADERS])
