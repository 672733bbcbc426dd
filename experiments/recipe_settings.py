"""Every setting that a recipe may have: of runs, comparisons, sweeps and Stage 1 trainings."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel

from alignlab.config.parts import LATENTS_DEFAULTS, TeacherConfig
from alignlab.config.run import RunConfig
from alignlab.config.setting_rows import SettingRow, setting_rows
from alignlab.errors import UserError, shown
from alignlab.experiments.compare.config import COMPARE_KEYS, OPTIONAL_COMPARE_KEYS, CompareConfig
from alignlab.experiments.sweep.config import SWEEP_KEYS, SweepConfig
from alignlab.losses import OBJECTIVES
from alignlab.losses.objective import ObjectiveConfig
from alignlab.stage1.config import Stage1Config
from alignlab.teachers import TEACHERS

Kind = Literal["run", "comparison", "sweep", "stage1"]

PLACEHOLDERS = {"teachers": "ALIAS", "space": "KEY", "metric": "N", "finding.expect": "N"}
"""What stands for the keys of mappings, and the places in lists, whose members have settings."""

MOST_NAMES = 5  # that are shown for an unknown one


@dataclass(frozen=True)
class RecipeSetting:
    """A setting and the kinds of recipe that read it.

    Args:
        recipes: the kinds, in the order run, comparison, sweep, stage1.
        row: name, type, default and meaning.
    """

    recipes: tuple[Kind, ...]
    row: SettingRow

    def as_json(self) -> dict[str, Any]:
        """Plain values with stable keys."""
        return {**self.row.as_json(), "recipes": list(self.recipes)}


def recipe_settings() -> list[RecipeSetting]:
    """All settings in the order of the config classes: runs, comparisons, sweeps, Stage 1.

    Objectives stand under their own names (`objectives.repa.weight`), what all of them have in
    common in a nested mapping under `objectives.ALIAS`. A teacher's settings stand under
    `teachers.ALIAS`, and what a family puts in their place under the family's name.
    """
    runs = list(_run_rows())
    settings = [RecipeSetting(_readers(row), row) for row in runs]
    compare_keys = (*COMPARE_KEYS, *OPTIONAL_COMPARE_KEYS)
    comparison = _top_level(CompareConfig, compare_keys)
    settings += [RecipeSetting(("comparison",), row) for row in comparison]
    settings += [RecipeSetting(("sweep",), row) for row in _top_level(SweepConfig, SWEEP_KEYS)]
    return _joined([*settings, *(RecipeSetting(("stage1",), row) for row in _stage1_rows())])


def named_settings(prefix: str | None) -> list[RecipeSetting]:
    """The settings whose dotted name begins with `prefix`; all for None.

    A recipe's own name fits where a name in capitals stands: `teachers.dino.grid` gives
    `teachers.ALIAS.grid`, and `objectives.refalign` what all objectives have in common as well.

    Raises:
        UserError: no setting begins so; it names the nearest.
    """
    settings = recipe_settings()
    if prefix is None:
        return settings
    asked = prefix.strip(".").split(".")
    chosen = [setting for setting in settings if _begins(setting.row.name.split("."), asked)]
    if not chosen:
        names = [setting.row.name for setting in settings]
        raise UserError(
            f"{shown(prefix)}: no setting begins with it; nearest: "
            f"{', '.join(_nearest(prefix, names))} (`alignlab list settings` shows all)"
        )
    return chosen


def _run_rows() -> Iterator[SettingRow]:
    for row in setting_rows(RunConfig, placeholders=PLACEHOLDERS):
        yield row
        if row.name == "objectives":
            yield from _objective_rows()
        elif row.name == f"teachers.{PLACEHOLDERS['teachers']}.shuffle":  # the last of a teacher
            yield from _family_rows()


def _objective_rows() -> Iterator[SettingRow]:
    common = set(ObjectiveConfig.model_fields)
    for name, objective in OBJECTIVES.items():
        for row in setting_rows(objective.Config, f"objectives.{name}", when=f"name: {name}"):
            parts = row.name.split(".")
            if len(parts) == 3 or parts[2] not in common:
                yield row
    for row in setting_rows(ObjectiveConfig, "objectives.ALIAS"):
        if row.name.count(".") > 2:  # of a schedule or a gate
            yield row


def _family_rows() -> Iterator[SettingRow]:
    """The settings of a teacher for which its family has a default."""
    rows = {row.name: row for row in setting_rows(TeacherConfig)}
    for family, teacher in TEACHERS.items():
        defaults: dict[str, Any] = {"path": teacher.path, "feature": teacher.feature}
        if teacher.reads == "latents":
            defaults |= LATENTS_DEFAULTS
        for key, default in defaults.items():
            yield replace(
                rows[key],
                name=f"teachers.{family}.{key}",
                default=default,
                when=f"family: {family}",
            )


def _top_level(config: type[BaseModel], keys: Sequence[str]) -> Iterator[SettingRow]:
    """What a comparison or a sweep reads besides the run's own settings."""
    for row in setting_rows(config, placeholders=PLACEHOLDERS):
        if row.name.split(".")[0] in keys:
            yield row


def _stage1_rows() -> Iterator[SettingRow]:
    """What a Stage 1 training reads."""
    refused = {f"teachers.ALIAS.{key}" for key in (*LATENTS_DEFAULTS, "shuffle")}
    for row in setting_rows(Stage1Config, placeholders=PLACEHOLDERS):
        if row.name not in refused:
            yield row
    for row in _family_rows():
        if TEACHERS[row.name.split(".")[1]].reads == "frames":
            yield row


def _readers(row: SettingRow) -> tuple[Kind, ...]:
    """Which recipes read a setting of a run."""
    return ("run", "sweep") if row.name == "seed" else ("run", "comparison", "sweep")


def _joined(settings: Sequence[RecipeSetting]) -> list[RecipeSetting]:
    """Equal settings of several kinds of recipe as one, whichever class declares them, at the
    first one's place."""
    joined: list[RecipeSetting] = []
    for setting in settings:
        row = setting.row
        equal = (replace(other.row, source=row.source) == row for other in joined)
        place = next((i for i, is_equal in enumerate(equal) if is_equal), None)
        if place is None:
            joined.append(setting)
        else:
            joined[place] = replace(setting, recipes=joined[place].recipes + setting.recipes)
    return joined


def _begins(name: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether a setting's dotted name begins with what was asked, both in parts."""
    if len(asked) > len(name):
        return False
    if asked[0] == "objectives" and len(asked) > 1 and asked[1] not in (*OBJECTIVES, "ALIAS"):
        return False  # an alias does not say which objective it is
    pairs = zip(name, asked, strict=False)
    return all(part == one or part in PLACEHOLDERS.values() for part, one in pairs)


def _nearest(prefix: str, names: Sequence[str]) -> list[str]:
    """Settings of that name in other sections, then names that are spelled alike."""
    last = prefix.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    parts = [name.split(".") for name in names]
    sections = dict.fromkeys(".".join(p[:depth]) for p in parts for depth in range(1, len(p) + 1))
    alike = difflib.get_close_matches(prefix, list(sections), n=MOST_NAMES, cutoff=0.5)
    top = [name for name in sections if "." not in name]
    return list(dict.fromkeys([*same, *alike] or top))[:MOST_NAMES]
