"""What the frames of all results have in common: their columns, and whose results a folder has."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from alignlab.errors import UserError
from alignlab.experiments.report.metric_table import bin_of, block_of, split_name

PARTS = ("quantity", "block", "noise_bin")
"""What is in the name of a metric: `cknna/block3` is the quantity `cknna` at block 3, `val/flow/t7`
is `val/flow` in bin 7 of the noise level."""

_TYPES = {
    **dict.fromkeys(("seed", "step", "trial"), "int64"),
    **dict.fromkeys(("block", "noise_bin", "same_as", "pruned_at"), "Int64"),
    **dict.fromkeys(("num_seeds", "num_pairs", "num_better"), "Int64"),
    **dict.fromkeys(("final", "claimed"), "bool"),
    "feasible": "boolean",
    "value": "float64",
}
_MARKERS = {
    "comparison.json": ("a comparison", "load_comparison"),
    "trials.csv": ("a sweep", "load_sweep"),
    "study.db": ("a sweep", "load_sweep"),
    "metrics.jsonl": ("a run", "load_run"),
}


def parts_of(metric: str) -> tuple[str, int | None, int | None]:
    """The `PARTS` of a metric's name."""
    return split_name(metric)[0], block_of(metric), bin_of(metric)


def frame(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A frame of rows, each column with the type that it has in every frame.

    Whole numbers that may be missing are pandas' `Int64`.
    """
    made = pd.DataFrame(list(rows), columns=list(columns))
    return made.astype({name: kind for name, kind in _TYPES.items() if name in made.columns})


def with_floats(made: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """The frame with these columns as numbers, NaN where there is none."""
    return made.astype(dict.fromkeys(names, "float64"))


def metric_rows(
    found: Mapping[str, float], step: int, *, final: bool
) -> Iterable[tuple[str, str, int | None, int | None, int, float, bool]]:
    """Rows (metric, its `PARTS`, step, value, final) of what was measured at one step."""
    for metric, value in found.items():
        yield metric, *parts_of(metric), step, value, final


def check_folder(path: Path, loader: str) -> None:
    """Refuses a folder with results of another kind than a function loads.

    Args:
        path: of the folder, or of a file in it.
        loader: the function's name.

    Raises:
        UserError: it names the function to call.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder{_RECIPES.get(loader, '')}")
    kinds = {_MARKERS[name] for name in _MARKERS if (path / name).exists()}
    for kind, other in sorted(kinds):
        if other != loader:
            raise UserError(f"{path} holds {kind}: alignlab.experiments.{other} reads it")


_RECIPES = {
    "load_run": "; alignlab.recipe.load_run reads recipes",
    "load_sweep": "; alignlab.experiments.sweep.config.load_sweep reads recipes",
}
