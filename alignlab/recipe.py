"""Recipes: YAML files plus `key=value` overrides, turned into validated configs.

A mistake raises `alignlab.errors.UserError` with one line that names the dotted key, what is valid
there and the nearest match.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from alignlab.config.data import unknown_name
from alignlab.config.identity import as_default, has_hash, identity, settings_hash
from alignlab.config.merging import flatten
from alignlab.config.parts import TrainingConfig
from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.config.validation_errors import first_problem
from alignlab.errors import UserError
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.registry import STAGE1_TASKS

# Settings that change no number of a run.
NUMBERLESS: dict[str, Any] = {
    "name": True,
    "output": True,
    "tracking": True,
    "checkpoint": True,
    "data": {
        "cache": {"mode": True, "path": True, "texts": True, "latents": True, "teachers": True},
        "workers": True,
        "prefetch": True,
    },
    "model": {"replicate": True},  # as the number of ranks, which no recipe has
    "optim": {"resume_schedule": True},  # what it did is in the run's history.json
    "eval": {"every": True, "sample_every": True},
}

MOST_SHOWN = 5  # settings, in one line

Model = TypeVar("Model", bound=BaseModel)


def load_run(
    recipe: str | Path, overrides: list[str] | None = None, *, stored: bool = False
) -> RunConfig:
    """The config of one run.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `tiny`.
        overrides: `dotted.key=value` strings, applied over the file.
        stored: see `validated`.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, a value of the wrong type.
    """
    mapping = read_recipe(recipe, overrides or [])
    refuse_other_command(recipe, mapping, "train")
    return validated(RunConfig, mapping, stored=stored)


def load_training(recipe: Path) -> TrainingConfig:
    """The config in a run's folder, whether it is of a run or of a Stage 1 training.

    Raises:
        UserError: as `load_run`.
    """
    mapping = read_recipe(recipe, [])
    return validated(Stage1Config if "stage1" in mapping else RunConfig, mapping, stored=True)


def load_stage1_run(
    kind: str, recipe: str | Path, overrides: list[str] | None = None
) -> Stage1Config:
    """The config of a Stage 1 training of this kind.

    Args:
        kind: what the caller asks for.
        recipe: path of a YAML file, or the name of a shipped recipe such as `stage1_sara`.
        overrides: `dotted.key=value` strings, applied over the file.

    Raises:
        UserError: as `load_run`, and when there is no such kind, or the recipe is no Stage 1
            training or of another kind.
    """
    if kind not in STAGE1_TASKS:
        raise UserError(f"alignlab stage1: {unknown_name('kind', kind, STAGE1_TASKS)}")
    mapping = read_recipe(recipe, overrides or [])
    if "stage1" not in mapping:
        refuse_other_command(recipe, mapping, "stage1")
    config = validated(Stage1Config, mapping)
    if config.stage1.kind != kind:
        raise UserError(
            f"{recipe} is of stage1.kind {config.stage1.kind}: "
            f"use `alignlab stage1 {config.stage1.kind} {recipe}`"
        )
    return config


def refuse_other_command(recipe: str | Path, mapping: Mapping[str, Any], command: str) -> None:
    """Refuses a recipe that another command reads.

    Args:
        recipe: as the user named it.
        mapping: what it holds.
        command: of the command line that was given it: `train`, `stage1`, `compare` or `sweep`.

    Raises:
        UserError: it names the right command.
    """
    right, what = _command_of(mapping)
    if right.split()[0] != command:
        raise UserError(f"{recipe} {what}: use `alignlab {right} {recipe}`")


def _command_of(mapping: Mapping[str, Any]) -> tuple[str, str]:
    """The command that reads a recipe, and what the recipe is."""
    if "variants" in mapping and mapping.get("tune") is not None:
        return "tune", "tunes and compares variants (it has 'tune')"
    if "variants" in mapping:
        return "compare", "is a comparison (it has 'variants')"
    if "space" in mapping:
        return "sweep", "is a sweep (it has 'space')"
    if "stage1" in mapping:
        settings = mapping["stage1"]
        kind = settings.get("kind") if isinstance(settings, Mapping) else None
        return f"stage1 {kind or 'sara'}", "trains a Stage 1 network (it has 'stage1')"
    return "train", "describes a single run (it has no 'variants', 'space' or 'stage1')"


def dump(config: TrainingConfig) -> str:
    """The resolved recipe as YAML; loading it again gives an equal config."""
    return _json_to_yaml(json.dumps(config.model_dump(mode="json")))


@lru_cache(maxsize=32)
def _json_to_yaml(settings: str) -> str:
    """What `to_yaml` makes of JSON: a run asks for its recipe several times, OmegaConf is slow."""
    return to_yaml(json.loads(settings))


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, in their order."""
    return str(OmegaConf.to_yaml(OmegaConf.create(dict(settings))))


def recipe_hash(config: TrainingConfig) -> str:
    """A short name of comparable runs (`alignlab.config.identity`).

    Settings that change no number are left out: name, output, tracking, checkpoint, `data.cache`
    but its dtype, `data.workers`, `data.prefetch`, `model.replicate`, `optim.resume_schedule`, and
    how often a run is evaluated while it trains.
    """
    return settings_hash(config, NUMBERLESS)


def has_recipe_hash(config: TrainingConfig, stored: str) -> bool:
    """Whether a hash that `recipe_hash` gave, in this version or an older one, is of `config`."""
    return has_hash(config, stored, NUMBERLESS)


def holds_recipe(path: Path, config: TrainingConfig) -> bool:
    """Whether a stored recipe gives the same numbers as `config`; not if it is of another kind."""
    try:
        held = validated(type(config), read_recipe(path, []), stored=True)
    except UserError:
        return False
    return identity(held, NUMBERLESS) == identity(config, NUMBERLESS)


def shown_difference(path: Path, config: TrainingConfig) -> str:
    """The settings that a recipe file has otherwise than `config`, in words."""
    try:
        held = validated(type(config), read_recipe(path, []), stored=True)
    except UserError:
        return "of another kind"
    there, here = (numbered_settings(recipe) for recipe in (held, config))
    return first_difference(there, here) or _shown_order(held, config)


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The settings, by dotted name, that were otherwise there, in words; empty for none.

    The first `MOST_SHOWN` of them, and how many more.
    """
    keys = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
    shown = [f"{key} was {there.get(key)}, is {here.get(key)}" for key in keys[:MOST_SHOWN]]
    if len(keys) > MOST_SHOWN:
        shown.append(f"and {len(keys) - MOST_SHOWN} more")
    return "; ".join(shown)


def _shown_order(held: TrainingConfig, config: TrainingConfig) -> str:
    """Which mapping two recipes with equal settings have in another order."""
    for section in ("objectives", "teachers"):  # losses are summed in it, the first is measured by
        there, here = (list(getattr(recipe, section, ())) for recipe in (held, config))
        if there != here:
            return f"{section} were in the order {', '.join(there)}, are in {', '.join(here)}"
    return "in what its files hold"


def numbered_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings that change a number by dotted name, without empty mappings."""
    numbered = _without(as_default(config, config.model_dump(mode="json")), NUMBERLESS)
    return {key: value for key, value in flatten(numbered).items() if value != {}}


def _without(settings: Mapping[str, Any], excluded: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if excluded.get(key) is not True}
    for key, inner in excluded.items():
        if inner is not True and isinstance(kept.get(key), Mapping):  # Stage 1 has no `eval`
            kept[key] = _without(kept[key], inner)
    return kept


def validated(
    model: type[Model], values: Mapping[str, Any], under: str = "", *, stored: bool = False
) -> Model:
    """The config that settings make.

    Args:
        model: its class.
        values: the settings.
        under: dotted key of the settings in the recipe, for the message; may be empty.
        stored: they were written whole by a run, maybe an older one: what they lack is as it was
            then (`alignlab.losses.objective.changed_default`).

    Raises:
        UserError: the first setting that is wrong, and what is valid there.
    """
    try:
        config = model.model_validate(values, context={"stored": stored})
    except ValidationError as error:
        raise UserError(first_problem(model, error, under)) from None
    for key in _truths_as_numbers(values, config):
        where = f"{under}.{key}" if under else key
        raise UserError(f"{where}: expected a number, got true or false (YAML's yes and no)")
    return config


def _truths_as_numbers(given: Any, taken: Any) -> Iterator[str]:
    """Dotted keys under which true or false was given, and pydantic took it for 1 or 0."""
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        yield ""
    elif isinstance(given, Mapping) and isinstance(taken, BaseModel | Mapping):
        for key, value in given.items():
            inner = taken.get(key) if isinstance(taken, Mapping) else getattr(taken, key, None)
            yield from (f"{key}.{rest}".rstrip(".") for rest in _truths_as_numbers(value, inner))
    elif isinstance(given, Sequence) and isinstance(taken, Sequence) and len(given) == len(taken):
        if not isinstance(given, str):
            for value, inner in zip(given, taken, strict=True):
                yield from _truths_as_numbers(value, inner)
