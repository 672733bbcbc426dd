"""How variants were tuned, for the report: what each sweep searched and found, and by when."""

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import JsonValue

from alignlab.experiments.charts.lines import is_drawn
from alignlab.experiments.compare.result import (
    TUNED,
    TUNED_BEST,
    TUNED_BORDER,
    TUNED_DIRECTION,
    TUNED_HISTORY,
    TUNED_SPACE,
    Comparison,
)
from alignlab.experiments.report.escaping import markdown_text
from alignlab.experiments.report.formatting import DASH, format_number

HEADER = ("variant", "setting", "searched", "best", "lies at")


class SearchedSetting(NamedTuple):
    """A setting that a variant's sweep searched, as text."""

    variant: str
    setting: str
    searched: str
    best: str
    border: str

    @property
    def warning(self) -> str:
        """That better values may lie beyond what was searched; empty inside."""
        if not self.border:
            return ""
        return (
            f"the best {self.setting} of its sweep, {self.best}, is at {self.border} of what was "
            f"searched ({self.searched}): a better one may lie beyond"
        )


def spent_facts(comparison: Comparison) -> dict[str, dict[str, JsonValue]]:
    """What was spent on tuning; what was found has a table and a chart of its own."""
    return {name: values for name, values in comparison.tuning.items() if name not in TUNED}


def searched_settings(comparison: Comparison) -> list[SearchedSetting]:
    """Every setting that a sweep searched, by variant; empty where none is known."""
    rows = []
    for variant in comparison.variants:
        space, best, ends = (
            _mapping(comparison, name, variant) for name in (TUNED_SPACE, TUNED_BEST, TUNED_BORDER)
        )
        for setting, searched in space.items():
            end = ends.get(setting)
            border = f"the {end} end" if end in ("lower", "upper") else ""
            value = _shown(best.get(setting))
            rows.append(SearchedSetting(variant, setting, _shown(searched), value, border))
    return rows


def border_warnings(comparison: Comparison, variant: str) -> list[str]:
    """One sentence for each setting of a variant whose best is at an end of its range."""
    rows = (row for row in searched_settings(comparison) if row.variant == variant)
    return [row.warning for row in rows if row.warning]


def markdown_tuning(comparison: Comparison) -> list[str]:
    """The table of what was searched and found, and the best so far of each variant."""
    rows = searched_settings(comparison)
    if not rows:
        return []
    lines = ["", f"| {' | '.join(HEADER)} |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (markdown_text(text) for text in (*row[:4], row.border or DASH))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Best so far, by trial (where it got better):", ""]
    for variant in comparison.variants:
        steps = _improvements(comparison, variant)
        if steps:
            shown = ", ".join(f"{format_number(value)} (trial {trial})" for trial, value in steps)
            lines.append(f"- {markdown_text(variant)}: {markdown_text(shown)}")
    return lines


def _improvements(comparison: Comparison, variant: str) -> list[tuple[int, float]]:
    """The trials that were better than all before them."""
    history = tuning_history(comparison, variant)
    sign = -1.0 if comparison.tuning.get(TUNED_DIRECTION, {}).get(variant) == "maximize" else 1.0
    better: list[tuple[int, float]] = []
    for trial, value in history:
        if not better or sign * value < sign * better[-1][1]:
            better.append((trial, value))
    return better


def tuning_history(comparison: Comparison, variant: str) -> list[tuple[int, float]]:
    """Trial and metric of what can be drawn: a file from elsewhere may hold anything."""
    points = comparison.tuning.get(TUNED_HISTORY, {}).get(variant)
    found = []
    for point in points if isinstance(points, list) else ():
        match point:
            case [int(trial), int() | float() as value] if is_drawn(value) and is_drawn(trial):
                found.append((trial, float(value)))
    return found


def tuned_metric(comparison: Comparison, variant: str) -> str:
    """The first metric of a variant's sweep."""
    match comparison.tuning.get("tuning.metric", {}).get(variant):
        case [str(name), *_]:
            return name
    return ""


def _mapping(comparison: Comparison, fact: str, variant: str) -> Mapping[str, JsonValue]:
    value = comparison.tuning.get(fact, {}).get(variant)
    return value if isinstance(value, dict) else {}


def _shown(value: JsonValue) -> str:
    match value:
        case None:
            return DASH
        case bool() | str() | int():
            return str(value)
        case float():
            return format_number(value)
        case list():
            return ", ".join(map(_shown, value))
    return str(value)
