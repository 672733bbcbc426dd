"""Variants tuned by a sweep of their own: `variants: {refalign: {from: runs/ra/best.yaml}}`.

Such a variant takes the sweep's objectives, the teachers that they read, and whatever else the
sweep searched. All other settings have to be the comparison's own, or the sweep tuned something
else.
"""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignlab.config.data import Settings
from alignlab.config.path_kinds import kind_of
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.errors import UserError, one_line
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.runs.checksums import DamagedError, damaged_files, read_checksums

SWEEP_AGAIN = "give the command of the sweep again, which writes it anew"
FINISHED = ("complete", "pruned", "fail")


class Tuning(Settings):
    """The sweep that a variant's settings come from."""

    sweep: str
    """Its `best.yaml`, as the recipe names it."""
    trials: int
    """Trials finished, pruned or failed."""
    steps: int
    """Steps of a trial's run."""
    seeds: int
    """Runs of a trial."""
    metric: tuple[str, ...]
    """What was optimised."""
    searched: tuple[str, ...]
    """Settings that were searched, by dotted name."""


def sweep_recipe(variant: str, source: Any) -> Path:
    """The recipe of the sweep whose `best.yaml` a variant names.

    Raises:
        UserError: no such file, or it does not lie in a sweep's folder.
    """
    where = f"variants.{variant}.from"
    if not isinstance(source, str):
        raise UserError(f"{where}: expected the path of a sweep's best.yaml, got {source!r}")
    best = user_path(source)
    if not best.is_file():
        kind = kind_of(best)
        if kind is not None and (best / "best.yaml").is_file():
            raise UserError(f"{where}: {source} is {kind.what}: name {best / 'best.yaml'}")
        raise UserError(f"{where}: {source}: no such file; a finished sweep writes best.yaml")
    for name in ("recipe.yaml", "trials.csv"):
        if not best.with_name(name).is_file():
            raise UserError(f"{where}: {source} is not in a sweep's folder: no {name} beside it")
    _check_files(best.parent)
    return best.with_name("recipe.yaml")


def _check_files(folder: Path) -> None:
    """Refuses results of a sweep that are not those that it wrote."""
    read = ("best.yaml", "recipe.yaml", "trials.csv")
    expected = read_checksums(folder) or {}
    wrong = damaged_files(folder, {n: digest for n, digest in expected.items() if n in read})
    for name, problem in wrong.items():
        raise DamagedError(folder / name, problem, SWEEP_AGAIN)


def tuning_of(source: str, sweep: SweepConfig) -> Tuning:
    """What a sweep spent on finding its best recipe."""
    trials = user_path(source).with_name("trials.csv")
    try:
        with trials.open(newline="") as file:
            states = [row["state"] for row in csv.DictReader(file)]
    except (KeyError, ValueError, csv.Error) as error:
        raise DamagedError(trials, f"no table of trials: {one_line(error)}", SWEEP_AGAIN) from error
    return Tuning(
        sweep=source,
        trials=sum(state in FINISHED for state in states),
        steps=sweep.base.steps,
        seeds=len(sweep.seeds),
        metric=tuple(metric.name for metric in sweep.metric),
        searched=tuple(sweep.space),
    )


def tuned_changes(
    variant: str,
    tuning: Tuning,
    differing: Mapping[str, Mapping[str, Any]],
    best: RunConfig,
    own: Mapping[str, Any],
) -> dict[str, Any]:
    """What the variant takes from the sweep; keys may be dotted.

    Args:
        variant: its name.
        tuning: the sweep.
        differing: settings by dotted key in which the comparison's base (`base`) and the best
            recipe (`best`) differ.
        best: the best recipe.
        own: what the variant changes besides, by dotted key.

    Raises:
        UserError: a setting that the sweep did not search differs from the comparison's.
    """
    used = {alias for objective in best.objectives.values() for alias in objective.teachers}
    resolved = best.model_dump(mode="json", include={"objectives", "teachers"})
    changes: dict[str, Any] = {"objectives": {}}  # those of the comparison's base go
    changes |= {f"objectives.{alias}": one for alias, one in resolved["objectives"].items()}
    changes |= {f"teachers.{alias}": resolved["teachers"][alias] for alias in sorted(used)}
    searched: dict[str, Any] = {}
    for key, values in differing.items():
        section, alias = key.split(".")[0], key.split(".")[1:2]
        if section in ("eval", "objectives") or key == "steps" or is_within(key, own):
            continue
        if section == "teachers" and (alias[0] not in used or _is_new(key, differing)):
            continue
        if not is_within(key, tuning.searched):
            raise UserError(
                f"variants.{variant}.from: {tuning.sweep} was tuned with {key} "
                f"{values['best']!r}, this comparison has {values['base']!r}: make them equal, or "
                f"set variants.{variant}.{key}"
            )
        searched[key] = values["best"]
    return changes | searched


def is_within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of these settings, or lies inside one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _is_new(key: str, differing: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the comparison's base has no teacher of that alias at all."""
    family = differing.get(".".join([*key.split(".")[:2], "family"]))
    return family is not None and family["base"] is None
