"""Recipes: YAML files plus `key=value` overrides, turned into validated configs.

A mistake raises `alignlab.errors.UserError` with one line that names the dotted key, what is valid
there and the nearest match.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from alignlab.config import CompareConfig, DataConfig, RunConfig, Tuning
from alignlab.config_errors import first_problem
from alignlab.config_sweep import SweepConfig
from alignlab.errors import UserError
from alignlab.losses.stage1_folder import Kind
from alignlab.recipe_file import (
    dotted_space,
    merge,
    nested_variants,
    read_recipe,
    shipped_recipes,
)
from alignlab.recipe_tuned import sweep_recipe, tuned_changes, tuning_of
from alignlab.stage1.config import Stage1Config

__all__ = [
    "differing_settings",
    "dump",
    "holds_recipe",
    "load_compare",
    "load_data",
    "load_run",
    "load_stage1_run",
    "load_sweep",
    "recipe_hash",
    "shipped_recipes",
]

COMPARE_KEYS = ("baseline", "seeds", "variants")
OPTIONAL_COMPARE_KEYS = ("allow_differences", "budget", "cost", "launch")
SWEEP_KEYS = (
    "space",
    "sampler",
    "pruner",
    "metric",
    "constraints",
    "trials",
    "seeds",
    "launch",
    "storage",
)
# Settings that change no number of a run.
NUMBERLESS: dict[str, Any] = {
    "name": True,
    "output": True,
    "tracking": True,
    "checkpoint": True,
    "data": {"cache_clips"},
}

Model = TypeVar("Model", bound=BaseModel)


def load_run(recipe: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The config of one run.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `tiny`.
        overrides: `dotted.key=value` strings, applied over the file.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, a value of the wrong type.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "variants" in mapping:
        raise UserError(
            f"{recipe} is a comparison (it has 'variants'): use `alignlab compare {recipe}`"
        )
    if "space" in mapping:
        raise UserError(f"{recipe} is a sweep (it has 'space'): use `alignlab sweep {recipe}`")
    if "stage1" in mapping:
        raise UserError(
            f"{recipe} trains a Stage 1 network (it has 'stage1'): "
            f"use `alignlab {_stage1_command(mapping)} {recipe}`"
        )
    return _validated(RunConfig, mapping)


def load_stage1_run(
    kind: Kind, recipe: str | Path, overrides: list[str] | None = None
) -> Stage1Config:
    """The config of a Stage 1 training of this kind.

    Args:
        kind: what the caller asks for.
        recipe: path of a YAML file, or the name of a shipped recipe such as `stage1_sara`.
        overrides: `dotted.key=value` strings, applied over the file.

    Raises:
        UserError: as `load_run`, and when the recipe is no Stage 1 training or of another kind.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "stage1" not in mapping:
        command = "compare" if "variants" in mapping else "train"
        raise UserError(
            f"{recipe} trains no Stage 1 network (it has no 'stage1'): "
            f"use `alignlab {command} {recipe}`"
        )
    config = _validated(Stage1Config, mapping)
    if config.stage1.kind != kind:
        raise UserError(
            f"{recipe} is of stage1.kind {config.stage1.kind}: "
            f"use `alignlab {_stage1_command(mapping)} {recipe}`"
        )
    return config


def load_compare(recipe: str | Path, overrides: list[str] | None = None) -> CompareConfig:
    """The config of a comparison; each variant is applied to the base and validated.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `demo`.
        overrides: `dotted.key=value` strings; those of one variant start with `variants.<name>.`.

    Raises:
        UserError: as `load_run`, when the recipe describes a single run, and when a variant's
            `from` names no best.yaml of a sweep that searched under the comparison's settings.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "variants" not in mapping:
        raise UserError(
            f"{recipe} describes a single run (it has no 'variants'): use `alignlab train {recipe}`"
        )
    missing = [key for key in COMPARE_KEYS if key not in mapping]
    if missing:
        raise UserError(f"{missing[0]}: missing; a comparison needs {', '.join(COMPARE_KEYS)}")
    if "seed" in mapping:
        raise UserError("seed: a comparison reads 'seeds'; remove 'seed'")
    if not mapping["variants"]:
        raise UserError("variants: name at least one variant")
    keys = [key for key in (*COMPARE_KEYS, *OPTIONAL_COMPARE_KEYS) if key in mapping]
    asked = {key: mapping.pop(key) for key in keys}
    base = _validated(RunConfig, mapping)
    variants = nested_variants(asked["variants"])
    runs, tuned = {}, {}
    for name, changes in variants.items():
        applied = changes
        if "from" in changes:
            tuned[name], applied = _tuned(name, changes, base)
        runs[name] = _validated(RunConfig, merge(mapping, applied), under=f"variants.{name}")
    built = {"variants": variants, "base": base, "runs": runs, "tuned": tuned}
    return _validated(CompareConfig, {**asked, **built})


def load_sweep(recipe: str | Path, overrides: list[str] | None = None) -> SweepConfig:
    """The config of a sweep. That its space fits the run is checked when the sweep begins.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `sweep_refalign`.
        overrides: `dotted.key=value` strings, such as `space.objectives.ra.weight.high=3`.

    Raises:
        UserError: as `load_run`, and when the recipe is no sweep.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "space" not in mapping:
        command = "compare" if "variants" in mapping else "train"
        raise UserError(f"{recipe} is no sweep (it has no 'space'): use `alignlab {command}`")
    if "seeds" in mapping and "seed" in mapping:
        raise UserError("seed: a sweep with 'seeds' does not read it; remove one")
    asked = {key: mapping.pop(key) for key in SWEEP_KEYS if key in mapping}
    if isinstance(asked["space"], Mapping):
        asked["space"] = dotted_space(asked["space"])
    asked.setdefault("seeds", [mapping.pop("seed", 0)])
    return _validated(SweepConfig, {**asked, "base": _validated(RunConfig, mapping)})


def load_data(recipe: str | Path, overrides: list[str] | None = None) -> DataConfig:
    """The data settings of a run's or a comparison's recipe.

    Raises:
        UserError: as `load_run` and `load_compare`.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "variants" in mapping:
        return load_compare(recipe, overrides).base.data
    if "space" in mapping:
        return load_sweep(recipe, overrides).base.data
    if "stage1" in mapping:
        return _validated(Stage1Config, mapping).data
    return load_run(recipe, overrides).data


def dump(config: RunConfig | CompareConfig | SweepConfig | Stage1Config) -> str:
    """The resolved recipe as YAML; loading it again gives an equal config."""
    if isinstance(config, CompareConfig):
        resolved = config.base.model_dump(mode="json", exclude={"seed"})
        resolved |= config.model_dump(mode="json", include={*COMPARE_KEYS, *OPTIONAL_COMPARE_KEYS})
    elif isinstance(config, SweepConfig):
        resolved = config.base.model_dump(mode="json", exclude={"seed"})
        resolved |= config.model_dump(mode="json", include=set(SWEEP_KEYS), exclude_none=True)
    else:
        resolved = config.model_dump(mode="json")
    return str(OmegaConf.to_yaml(OmegaConf.create(resolved)))


def recipe_hash(config: RunConfig | Stage1Config) -> str:
    """Twelve hex digits that name comparable runs.

    Only settings that change no number are left out: name, output, tracking, checkpoint and
    `data.cache_clips`.
    """
    resolved = config.model_dump(mode="json", exclude=NUMBERLESS)
    canonical = json.dumps(resolved, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def holds_recipe(path: Path, config: RunConfig | Stage1Config) -> bool:
    """Whether a recipe file gives the same numbers as `config`; not if it is of another kind."""
    try:
        held = _validated(type(config), read_recipe(path, []))
    except UserError:
        return False
    return recipe_hash(held) == recipe_hash(config)


def shown_difference(path: Path, config: RunConfig | Stage1Config) -> str:
    """The first setting that a recipe file has otherwise than `config`, in words."""
    try:
        held = _validated(type(config), read_recipe(path, []))
    except UserError:
        return "of another kind"
    there, here = (
        _flatten(recipe.model_dump(mode="json", exclude=NUMBERLESS)) for recipe in (held, config)
    )
    keys = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
    if not keys:
        return "in what its files hold"
    more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0]} was {there.get(keys[0])}, is {here.get(keys[0])}{more}"


def differing_settings(runs: Mapping[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """What differs between variants: dotted key -> variant -> value (None where it is not set).

    The seed, and what `recipe_hash` leaves out, are no settings of a variant.
    """
    flat = {
        variant: _flatten(run.model_dump(mode="json", exclude={**NUMBERLESS, "seed": True}))
        for variant, run in runs.items()
    }
    keys = sorted({key for settings in flat.values() for key in settings})
    rows = {key: {variant: flat[variant].get(key) for variant in flat} for key in keys}
    return {
        key: row
        for key, row in rows.items()
        if any(v != next(iter(row.values())) for v in row.values())
    }


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tuned(
    variant: str, changes: Mapping[str, Any], base: RunConfig
) -> tuple[Tuning, dict[str, Any]]:
    """The sweep of a variant with `from`, and its changes with what it takes from there."""
    source, own = changes["from"], {key: v for key, v in changes.items() if key != "from"}
    sweep = load_sweep(sweep_recipe(variant, source))
    best, tuning = load_run(source), tuning_of(source, sweep)
    differing = differing_settings({"base": base, "best": best})
    taken = tuned_changes(variant, tuning, differing, best, _flatten(own))
    return tuning, merge(taken, own)


def _stage1_command(mapping: Mapping[str, Any]) -> str:
    settings = mapping["stage1"]
    kind = settings.get("kind") if isinstance(settings, Mapping) else None
    return f"stage1 {kind or 'sara'}"


def _validated(model: type[Model], values: Mapping[str, Any], under: str = "") -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(first_problem(model, error, under)) from None
