"""The variants of a comparison: what each changes, those of a grid, and how they are shown."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from alignlab.config.names import check_name
from alignlab.config.run import RunConfig
from alignlab.config.written_names import refuse_written
from alignlab.errors import UserError

GRID = "grid"
MAX_GRID = 1000


def checked_variants(variants: Any) -> dict[str, dict[str, Any]]:
    """The changes of every variant by dotted key; those of a `grid` are written out.

    Args:
        variants: name -> changes, as `alignlab.config.recipe_file.read_recipe` gives them.

    Raises:
        UserError: what is no mapping, a name that is no folder's, a setting of the comparison, a
            grid without lists of values.
    """
    if not isinstance(variants, dict):
        raise UserError("variants: expected a mapping of variant names to changes")
    checked: dict[str, dict[str, Any]] = {}
    for name, changes in variants.items():
        if not isinstance(changes, dict):
            raise UserError(f"variants.{name}: expected a mapping of changes, {{}} for none")
        try:
            check_name(name, "a variant's name")
        except ValueError as error:
            raise UserError(f"variants: {error}") from None
        try:
            refuse_written(name)
        except ValueError as error:
            raise UserError(f"variants.{name}: {error}") from None
        for key in ("name", "seed", "output"):
            if any(f"{change}.".startswith(f"{key}.") for change in changes):
                raise UserError(f"variants.{name}.{key}: the comparison sets it, a variant cannot")
        for variant, its_changes in _grid(changes) if name == GRID else [(name, changes)]:
            if variant in checked or (name == GRID and variant in variants):
                raise UserError(f"variants: {variant!r} stands there twice, once in the grid")
            checked[variant] = its_changes
    return checked


def _grid(axes: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of the values of a grid, with its name: `weight-0.1_blocks-0-1`."""
    if not axes:
        raise UserError("variants.grid: names no setting; give dotted keys with lists of values")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"variants.grid.{key}: expected a list of the setting's values, got {values!r}; "
                "a variant that is no grid needs another name"
            )
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MAX_GRID:
        raise UserError(f"variants.grid: has {count} points; more than {MAX_GRID} are a sweep's")
    shown = _short_keys(list(axes))
    for point in itertools.product(*axes.values()):
        parts = (f"{shown[key]}-{_slug(value)}" for key, value in zip(axes, point, strict=True))
        yield "_".join(parts), dict(zip(axes, point, strict=True))


def _short_keys(keys: list[str]) -> dict[str, str]:
    """The last part of each key, or of several with the same as much as tells them apart."""
    short = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            end = parts[-count:]
            if sum(other.split(".")[-count:] == end for other in keys) == 1:
                break
        short[key] = ".".join(end)
    return short


def _slug(value: Any) -> str:
    text = re.sub(r"[^A-Za-z0-9.+-]+", "-", str(value)).rstrip("-")
    return text if isinstance(value, int | float) else text.lstrip("-") or "none"


def shown_variants(runs: Mapping[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """Each variant's objectives, and the sections of its recipe that not all variants share."""
    dumped = {variant: run.model_dump(mode="json") for variant, run in runs.items()}
    first = next(iter(dumped.values()))
    sections = [
        key
        for key in first
        if key == "objectives" or any(run[key] != first[key] for run in dumped.values())
    ]
    return {variant: {key: run[key] for key in sections} for variant, run in dumped.items()}


def baseline_notice(baseline: str, run: RunConfig) -> str | None:
    """One sentence about a baseline that is no plain fine-tuning; None if it is."""
    if not run.objectives:
        return None
    trained = ", ".join(f"{alias} ({o.name})" for alias, o in run.objectives.items())
    return (
        f"the baseline {baseline} trains {trained}: differences are against that, not against "
        "plain fine-tuning"
    )
