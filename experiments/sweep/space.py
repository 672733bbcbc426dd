"""The search space of a sweep: from dotted recipe keys to Optuna's parameters and back.

A trial's *params* are Optuna's names and values; its *values* are recipe settings by dotted key.
One key may take several params: blocks `first` to `first + size - 1` are a range.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from optuna import Trial
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from alignlab.config.data import unknown_name
from alignlab.config.merging import merge
from alignlab.config.run import RunConfig, check_blocks
from alignlab.errors import UserError
from alignlab.experiments.compare.fairness import why_not_searched
from alignlab.experiments.sweep.config import (
    MAX_GRID,
    BlocksSpace,
    CategoricalSpace,
    FloatSpace,
    IntSpace,
    Parameter,
    SweepConfig,
)
from alignlab.losses.weight import GradientShare
from alignlab.models.experts import transformer_part
from alignlab.models.model_files import on_disk, read_object
from alignlab.recipe import recipe_hash, validated

Params = dict[str, Any]


def distributions(key: str, parameter: Parameter) -> dict[str, BaseDistribution]:
    """Optuna's parameters of one recipe key, by name."""
    match parameter:
        case FloatSpace():
            low, high, step = parameter.low, parameter.high, parameter.step
            return {key: FloatDistribution(low, high, log=parameter.log, step=step)}
        case IntSpace():
            low, high, step = parameter.low, parameter.high, parameter.step
            return {key: IntDistribution(low, high, log=parameter.log, step=step)}
        case CategoricalSpace():
            return {key: CategoricalDistribution([label(c) for c in parameter.choices])}
        case BlocksSpace(choose="single"):
            return {key: IntDistribution(parameter.first, parameter.last)}
        case BlocksSpace(choose="range"):
            return {
                f"{key}.first": IntDistribution(parameter.first, parameter.last),
                f"{key}.size": IntDistribution(1, _max_size(parameter)),
            }
        case BlocksSpace():
            # One pick more than is needed chooses a block again, or none: every point is valid.
            others = range(2, _max_size(parameter) + 1)
            none = parameter.first - 1
            return {
                f"{key}.pick1": IntDistribution(parameter.first, parameter.last),
                **{f"{key}.pick{i}": IntDistribution(none, parameter.last) for i in others},
            }


def value_of(key: str, parameter: Parameter, params: Params) -> Any:
    """The recipe's value that a trial's params stand for."""
    match parameter:
        case CategoricalSpace():
            labels = [label(choice) for choice in parameter.choices]
            return parameter.choices[labels.index(params[key])]
        case BlocksSpace(choose="single"):
            return [params[key]]
        case BlocksSpace(choose="range"):
            first, size = params[f"{key}.first"], params[f"{key}.size"]
            return list(range(first, min(first + size - 1, parameter.last) + 1))
        case BlocksSpace():
            picked = {params[name] for name in distributions(key, parameter)}
            return sorted(block for block in picked if block >= parameter.first)
        case _:
            return params[key]


def suggest_values(trial: Trial, space: Mapping[str, Parameter]) -> dict[str, Any]:
    """The recipe values of a trial, by dotted key; those of a resumed trial are the same again."""
    values = {}
    for key, parameter in space.items():
        params = {
            name: _suggest(trial, name, d) for name, d in distributions(key, parameter).items()
        }
        values[key] = value_of(key, parameter, params)
    return values


def apply_values(base: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The run with these settings replaced, as an override would.

    Raises:
        UserError: the settings do not fit the run, or each other.
    """
    return validated(RunConfig, merge(base.model_dump(mode="json", exclude_unset=True), values))


def settings_of(config: SweepConfig, params: Params) -> str | None:
    """A short name of what a trial trains; equal for params that stand for the same settings.

    None where params are missing, or make no run.
    """
    values = {}
    for key, parameter in config.space.items():
        if not distributions(key, parameter).keys() <= params.keys():
            return None
        values[key] = value_of(key, parameter, params)
    try:
        return recipe_hash(apply_values(config.base, values))
    except UserError:
        return None


def own_params(config: SweepConfig) -> Params | None:
    """The params under which a trial is the recipe itself; None if one value lies outside."""
    own: Params = {}
    for key, parameter in config.space.items():
        same = (
            params
            for params in _candidates(key, parameter, setting_of(config.base, key))
            if apply_values(config.base, {key: value_of(key, parameter, params)}) == config.base
        )
        params = next(same, None)
        if params is None:
            return None
        own |= params
    return own


def grid_points(config: SweepConfig) -> list[Params]:
    """The params of every combination, the recipe's own first if it is one of them."""
    axes = [
        list(itertools.islice(_axis(key, parameter), MAX_GRID + 1))
        for key, parameter in config.space.items()
    ]
    if math.prod(map(len, axes)) > MAX_GRID:
        raise UserError(
            f"sampler: the grid has more than {MAX_GRID} points: widen the steps, or use another "
            "sampler"
        )
    points = [
        {name: value for part in parts for name, value in part.items()}
        for parts in itertools.product(*axes)
    ]
    own = own_params(config)
    return sorted(points, key=lambda point: point != own)


def check_space(config: SweepConfig) -> None:
    """Refuses, before any trial, what no run could take or no sweep can search.

    Raises:
        UserError: a key that the recipe does not have, that no number depends on or that says how
            a run is measured; a value that its setting refuses; a block that the transformer does
            not have.
    """
    num_blocks = num_blocks_of(config.base)
    tried = [config.base]
    for key, parameter in config.space.items():
        _refuse(key, _why_no_weight(config.base, key, parameter))
        setting_of(config.base, key)
        _refuse(key, why_not_searched(key, config.base))
        runs = []
        for value in _extremes(parameter):
            try:
                run = apply_values(config.base, {key: value})
                if num_blocks is not None:
                    check_blocks(run, num_blocks)
            except UserError as error:
                raise UserError(f"space.{key}: {label(value)} does not fit: {error}") from None
            runs.append(run)
        _refuse(key, why_not_searched(key, config.base, runs))
        tried += runs
    read = {alias for run in tried for o in run.objectives.values() for alias in o.teachers}
    for key in config.space:
        section, alias = [*key.split("."), ""][:2]
        if section == "teachers" and alias and alias not in read:
            _refuse(key, f"no objective reads the teacher {alias}; remove it")


def _why_no_weight(base: RunConfig, key: str, parameter: Parameter) -> str:
    """Why numbers may not be searched in the place of a weight that is measured, or empty."""
    for alias, objective in base.objectives.items():
        weight = f"objectives.{alias}.weight"
        is_share = isinstance(objective.weight, GradientShare)
        if key == weight and is_share and not isinstance(parameter, CategoricalSpace):
            return (
                "the recipe has this weight measured, and numbers would take its place: search "
                f"{key}.gradient_share, or give the weight as a number"
            )
        if key.startswith(f"{weight}.") and not is_share:
            return f"the recipe gives {weight} as a number: search that"
    return ""


def _refuse(key: str, reason: str) -> None:
    if reason:
        raise UserError(f"space.{key}: {reason}")


def tapped_blocks(config: SweepConfig) -> tuple[int, ...]:
    """All blocks that any trial may align: all are measured, so that trials can be compared."""
    runs = [config.base]
    for key, parameter in config.space.items():
        runs += [apply_values(config.base, {key: value}) for value in _extremes(parameter)]
        if isinstance(parameter, BlocksSpace):
            # one by one: an objective may pair them with as many others
            for block in range(parameter.first + 1, parameter.last):
                runs.append(apply_values(config.base, {key: [block]}))
    return tuple(
        sorted({b for run in runs for o in run.objectives.values() for b in o.tapped_blocks})
    )


def label(value: Any) -> Any:
    """A recipe value as Optuna keeps it: lists and mappings become text."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_float(name, low, high, log=log, step=step)
        case IntDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_int(name, low, high, log=log, step=step)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise TypeError(distribution)


def _max_size(parameter: BlocksSpace) -> int:
    return parameter.max_size or parameter.count


def _candidates(key: str, parameter: Parameter, own: Any) -> Iterator[Params]:
    """Params that may stand for the recipe's own value."""
    match parameter:
        case FloatSpace() | IntSpace():
            numeric = isinstance(own, int | float) and parameter.low <= own <= parameter.high
            on_step = numeric and distributions(key, parameter)[key]._contains(own)
            yield from [{key: own}] if on_step else []
        case CategoricalSpace():
            yield from _axis(key, parameter)
        case BlocksSpace():
            same = (p for p in _axis(key, parameter) if value_of(key, parameter, p) == own)
            yield from same


def _axis(key: str, parameter: Parameter) -> Iterator[Params]:
    """Params of every value of a parameter that has finitely many."""
    match parameter:
        case FloatSpace(step=None):
            raise UserError(f"space.{key}: a grid needs a step, or a categorical space")
        case FloatSpace(low=low, high=high, step=float(step)):
            count = math.floor((high - low) / step + 1e-9)
            yield from ({key: low + i * step} for i in range(count + 1))
        case IntSpace():
            yield from ({key: v} for v in range(parameter.low, parameter.high + 1, parameter.step))
        case CategoricalSpace():
            yield from ({key: label(choice)} for choice in parameter.choices)
        case BlocksSpace(choose="single"):
            yield from ({key: b} for b in range(parameter.first, parameter.last + 1))
        case BlocksSpace(choose="range"):
            for first in range(parameter.first, parameter.last + 1):
                longest = min(_max_size(parameter), parameter.last + 1 - first)
                for size in range(1, longest + 1):
                    yield {f"{key}.first": first, f"{key}.size": size}
        case BlocksSpace():
            yield from _subsets(key, parameter)


def _subsets(key: str, parameter: BlocksSpace) -> Iterator[Params]:
    names = list(distributions(key, parameter))
    none = parameter.first - 1
    for size in range(1, len(names) + 1):
        for blocks in itertools.combinations(range(parameter.first, parameter.last + 1), size):
            padded = (*blocks, *[none] * (len(names) - size))
            yield dict(zip(names, padded, strict=True))


def _extremes(parameter: Parameter) -> list[Any]:
    match parameter:
        case FloatSpace() | IntSpace():
            return [parameter.low, parameter.high]
        case CategoricalSpace():
            return list(parameter.choices)
        case BlocksSpace():
            return [[parameter.first], [parameter.last]]


def setting_of(base: RunConfig, key: str) -> Any:
    """The recipe's own value.

    Raises:
        UserError: no such key.
    """
    here: Any = base.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(here, dict) or part not in here:
            names = here if isinstance(here, dict) else ()
            raise UserError(f"space.{key}: {unknown_name('key', part, names)}")
        here = here[part]
    return here


def num_blocks_of(base: RunConfig) -> int | None:
    """Read from the model's folder; None for a model that is not there yet."""
    folder = on_disk(base.model.path)
    part = transformer_part(base.model.expert)
    path = None if folder is None else folder / part / "config.json"
    if path is None or not path.is_file():
        return None
    layers = read_object(path, setting="model.path").get("num_layers")
    if not isinstance(layers, int):
        raise UserError(f"model.path: {path} has no num_layers: fetch it again")
    return layers
