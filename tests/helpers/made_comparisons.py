"""Comparisons whose runs nobody trained."""

from collections.abc import Iterable
from typing import Any

from alignlab.experiments.compare.result import Comparison, RunResult


def make_comparison(results: Iterable[RunResult], **fields: Any) -> Comparison:
    """A comparison of these runs against `none`; variants and seeds are those that have runs."""
    runs = tuple(results)
    defaults: dict[str, Any] = {
        "name": "made up",
        "baseline": "none",
        "seeds": tuple(sorted({run.seed for run in runs})),
        "variants": tuple(dict.fromkeys(run.variant for run in runs)),
        "recipe": "name: made up\n",
        "differing": {},
        "environment": {},
        "duration_s": 1.0,
        "command": "alignlab compare",
        "commit": "",
    }
    return Comparison(**(defaults | fields), results=runs)
