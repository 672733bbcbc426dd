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

from alignlab.config import CompareConfig, DataConfig, RunConfig
from alignlab.config_errors import first_problem
from alignlab.errors import UserError
from alignlab.recipe_file import merge, nested_variants, read_recipe, shipped_recipes

__all__ = [
    "differing_settings",
    "dump",
    "load_compare",
    "load_data",
    "load_run",
    "recipe_hash",
    "shipped_recipes",
]

COMPARE_KEYS = ("baseline", "seeds", "variants")
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
    return _validated(RunConfig, mapping)


def load_compare(recipe: str | Path, overrides: list[str] | None = None) -> CompareConfig:
    """The config of a comparison; each variant is applied to the base and validated.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `demo`.
        overrides: `dotted.key=value` strings; those of one variant start with `variants.<name>.`.

    Raises:
        UserError: as `load_run`, and when the recipe describes a single run.
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
    asked = {key: mapping.pop(key) for key in COMPARE_KEYS}
    base = _validated(RunConfig, mapping)
    variants = nested_variants(asked["variants"])
    runs = {
        name: _validated(RunConfig, merge(mapping, changes), under=f"variants.{name}")
        for name, changes in variants.items()
    }
    return _validated(CompareConfig, {**asked, "variants": variants, "base": base, "runs": runs})


def load_data(recipe: str | Path, overrides: list[str] | None = None) -> DataConfig:
    """The data settings of a run's or a comparison's recipe.

    Raises:
        UserError: as `load_run` and `load_compare`.
    """
    if "variants" in read_recipe(recipe, overrides or []):
        return load_compare(recipe, overrides).base.data
    return load_run(recipe, overrides).data


def dump(config: RunConfig | CompareConfig) -> str:
    """The resolved recipe as YAML; loading it again gives an equal config."""
    if isinstance(config, RunConfig):
        resolved = config.model_dump(mode="json")
    else:
        resolved = config.base.model_dump(mode="json", exclude={"seed"})
        resolved |= config.model_dump(mode="json", include=set(COMPARE_KEYS))
    return str(OmegaConf.to_yaml(OmegaConf.create(resolved)))


def recipe_hash(config: RunConfig) -> str:
    """Twelve hex digits that name comparable runs.

    Only settings that change no number are left out: name, output, tracking, checkpoint and
    `data.cache_clips`.
    """
    resolved = config.model_dump(mode="json", exclude=NUMBERLESS)
    canonical = json.dumps(resolved, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


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


def _validated(model: type[Model], values: Mapping[str, Any], under: str = "") -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(first_problem(model, error, under)) from None
