"""Equal wall time or equal compute: how many steps each variant gets, decided once.

Whatever follows from `steps` follows the variant's own number: the learning rate's decay
(`optim.schedule`) and a ramp without `end` (`objectives.<alias>.schedule`) reach their end at its
last step. What a recipe gives in steps (`optim.warmup`, `end`, `checkpoint.every`) stays as it is.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig
from alignlab.experiments.compare.cost import cost_of
from alignlab.experiments.compare.result import Budget, Cost
from alignlab.losses.schedule import StopAtPlateau, weight_at
from alignlab.recipe import has_recipe_hash, recipe_hash
from alignlab.runs.checksums import DamagedError, read_json, write_json
from alignlab.runs.file_lock import file_lock
from alignlab.runs.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _BudgetFile:
    """`budget.json`: the decision, and the recipes that it was made for."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    baseline: str
    recipes: dict[str, str]
    budget: Budget


_BUDGET_FILE = TypeAdapter(_BudgetFile)


def decide_budget(config: CompareConfig, folder: Path) -> Budget | None:
    """Steps of every variant, kept in `folder`/budget.json: a resumed comparison decides nothing.

    A variant that is new to the comparison is added, the others keep their steps. A comparison with
    more `steps` than it was decided for is prolonged at the ratios that it was decided with.

    Args:
        config: the comparison; its `budget` says what is equal.
        folder: of the comparison; exists.

    Returns:
        None for equal steps.

    Raises:
        UserError: a variant's step does not always cost the same, a variant sets its own `steps`,
            the cost cannot be measured, or the folder holds a budget of another recipe.
    """
    path = folder / "budget.json"
    if config.budget == "steps":
        if path.exists():
            _drop(path)
        return None
    lock = folder / "budget.json.lock"  # several commands may share the folder
    with file_lock(lock, waiting=lambda: f"waiting for the process that measures costs ({lock})"):
        return _decided(config, path)


def _decided(config: CompareConfig, path: Path) -> Budget:
    _check_steps(config)
    _check_constant_cost(config, {v: run.steps for v, run in config.runs.items()})
    kept = _read(path)
    if kept is not None and not _is_same(config, kept):
        _drop(path)
        kept = None
    steps = config.runs[config.baseline].steps
    planned = steps if kept is None else kept.budget.steps[kept.baseline]
    recipes = {v: recipe_hash(_planned(run, planned)) for v, run in config.runs.items()}
    budget = None if kept is None else kept.budget
    if budget is None or not recipes.keys() <= budget.steps.keys():
        budget = _decide(config, _measured(config, path.parent), budget, planned)
        hashes = recipes if kept is None else kept.recipes | recipes
        content = _BudgetFile(config.baseline, hashes, budget)
        write_json(path, _BUDGET_FILE.dump_python(content, mode="json"))
    if steps != planned:  # prolonged since, at the ratios that were measured
        budget = replace(budget, steps=_steps_at(steps, budget.ratios))
    for variant in config.variants:
        log.info("%s: %s gets %d steps", budget.label, variant, budget.steps[variant])
    return budget


def with_budget(config: CompareConfig, budget: Budget | None) -> CompareConfig:
    """The comparison with every variant's own number of steps."""
    if budget is None:
        return config
    runs = {v: r.model_copy(update={"steps": budget.steps[v]}) for v, r in config.runs.items()}
    return config.model_copy(update={"runs": runs})


def relative_cost(config: CompareConfig, cost: Cost) -> dict[str, float]:
    """Cost of a step of each variant over that of the baseline's: seconds, or FLOPs."""
    if config.budget == "wall_time":
        return {v: cost.variants[v].slower.value for v in config.variants}
    base = cost.variants[config.baseline].flops
    return {v: cost.variants[v].flops / base for v in config.variants}


def _decide(config: CompareConfig, cost: Cost, earlier: Budget | None, steps: int) -> Budget:
    assert config.budget != "steps"
    ratios = relative_cost(config, cost)
    if earlier is not None:
        ratios |= earlier.ratios
    budget = Budget(kind=config.budget, ratios=ratios, steps=_steps_at(steps, ratios))
    _check_constant_cost(config, budget.steps)
    return budget


def _measured(config: CompareConfig, folder: Path) -> Cost:
    cost = cost_of(config, folder)
    if cost is None:
        raise UserError(
            f"budget: {config.budget} needs the cost of a step, which cannot be measured here: the "
            "baseline and a variant do not fit into memory together; use budget: steps"
        )
    if config.budget == "compute" and cost.unknown:
        raise UserError(
            f"budget: compute needs FLOPs, and there is no formula for {', '.join(cost.unknown)}; "
            "set model.attention=native or use another budget"
        )
    return cost


def _check_steps(config: CompareConfig) -> None:
    base = config.runs[config.baseline]
    for variant, run in config.runs.items():
        if run.steps != base.steps:
            raise UserError(
                f"variants.{variant}.steps: nothing reads it with budget: {config.budget}, which "
                "gives every variant its number of steps; remove it"
            )


def _check_constant_cost(config: CompareConfig, steps: Mapping[str, int]) -> None:
    """The ratio of one step decides on all steps, so it must hold for all of them."""
    for variant, run in config.runs.items():
        for alias, objective in run.objectives.items():
            schedule, last = objective.schedule, steps[variant] - 1
            if isinstance(schedule, StopAtPlateau) or not weight_at(schedule, last, last + 1):
                raise UserError(
                    f"variants.{variant}.objectives.{alias}.schedule: {schedule.kind} turns the "
                    "objective off, and a step then costs less than was measured; with "
                    f"budget: {config.budget} use a schedule that does not, or budget: steps"
                )


def _read(path: Path) -> _BudgetFile | None:
    if not path.exists():
        return None
    fix = "copy it back from elsewhere, or remove the comparison's folder"
    content = read_json(path, fix=fix)
    try:
        return _BUDGET_FILE.validate_json(json.dumps(content))
    except ValidationError:
        raise DamagedError(path, "it holds no budget", fix) from None


def _drop(path: Path) -> None:
    """Removes a budget of another recipe, if no run of the comparison has kept a step.

    Raises:
        UserError: one has.
    """
    runs = [RunFolder(recipe.parent) for recipe in path.parent.glob("*/seed-*/recipe.yaml")]
    if any(run.has_begun for run in runs):
        raise UserError(_other_recipe(path))
    log.info("%s was decided for another recipe, of which no run kept a step: decided anew", path)
    path.unlink()


def _is_same(config: CompareConfig, kept: _BudgetFile) -> bool:
    shared = config.runs.keys() & kept.recipes.keys()
    planned, steps = kept.budget.steps[kept.baseline], config.runs[config.baseline].steps
    changed = steps < planned or any(
        not has_recipe_hash(_planned(config.runs[variant], planned), kept.recipes[variant])
        for variant in shared
    )
    return not changed and (kept.baseline, kept.budget.kind) == (config.baseline, config.budget)


def _other_recipe(path: Path) -> str:
    return (
        f"{path} was decided for another recipe: choose another name, or remove the comparison's "
        "folder"
    )


def _steps_at(steps: int, ratios: Mapping[str, float]) -> dict[str, int]:
    """Of every variant, where the baseline has so many."""
    return {v: max(1, round(steps / ratio)) for v, ratio in ratios.items()}


def _planned(run: RunConfig, steps: int) -> RunConfig:
    """A variant's run without its seed, as it was planned when the budget was decided."""
    return run.model_copy(update={"seed": 0, "steps": steps})
