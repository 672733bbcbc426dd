"""Prolonging: a training that was planned for fewer steps goes on to more.

`history.json` in a run's folder names the legs of a training that was prolonged: how many steps
each was planned for, and at which step it took over. A training that never was has no such file.
A leg counts once `recipe.yaml` has its steps; the result of the steps before is kept as
`result-<steps>.json`.

What else than the end depends on `steps`: the decay of the learning rate (`optim.schedule`) and
ramps of objectives without `end`. They follow `SchedulePlan`, which says how many steps they take
the training for.
"""

import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from alignlab.config.identity import identity
from alignlab.config.parts import TrainingConfig
from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.losses.schedule import Ramp
from alignlab.progress import warn_once
from alignlab.recipe import NUMBERLESS, validated
from alignlab.runs.checkpoint_folders import mark_checkpoint, step_folders
from alignlab.runs.checksums import DamagedError, read_json, write_json
from alignlab.runs.metric_rows import mark_log, read_rows, write_rows

if TYPE_CHECKING:
    from alignlab.runs.run_folder import RunFolder

HISTORY = "history.json"


class Leg(BaseModel):
    """A part of a training, from one plan to the next.

    Args:
        steps: the number of steps that was planned when it began.
        from_step: steps that were done then.
        begun: date and time; empty for the first leg.
        resume_schedule: what the recipe said of schedules that depend on `steps`.
    """

    steps: int
    from_step: int = 0
    begun: str = ""
    resume_schedule: Literal["keep", "stretch"] | None = None


_LEGS = TypeAdapter(tuple[Leg, ...])


class SchedulePlan:
    """For how many steps schedules take a training, at each of its steps.

    Args:
        legs: in order.
    """

    def __init__(self, legs: Iterable[Leg]) -> None:
        self.legs = tuple(legs)

    @classmethod
    def of(cls, config: TrainingConfig) -> "SchedulePlan":
        """That of a training that is not prolonged."""
        return cls([Leg(steps=config.steps)])

    def total_steps(self, step: int) -> int:
        """Number of steps that a schedule reaches its end after, as of a step (0-based).

        From the step on at which a leg took over this is the leg's, unless that kept the schedules
        as they were planned.
        """
        total = self.legs[0].steps
        for leg in self.legs[1:]:
            if step >= leg.from_step and leg.resume_schedule != "keep":
                total = leg.steps
        return total

    @property
    def was_prolonged(self) -> bool:
        """Whether there is more than one leg."""
        return len(self.legs) > 1

    def notes(self) -> list[str]:
        """What `result.json` says of it: nothing of a training that was not prolonged."""
        if not self.was_prolonged:
            return []
        said = self.legs[-1].resume_schedule
        how = "" if said is None else f", schedules: {said}"
        legs = "; ".join(f"{leg.steps} steps from step {leg.from_step}" for leg in self.legs)
        return [f"prolonged: it was planned for fewer steps at first{how} [{legs}]"]


def planned_by_steps(config: TrainingConfig) -> list[str]:
    """The settings of a recipe whose schedules depend on `steps`, as a message names them."""
    found = []
    if config.optim.schedule != "constant":
        found.append(f"optim.schedule ({config.optim.schedule})")
    for alias, objective in config.objectives.items() if isinstance(config, RunConfig) else ():
        schedule = objective.schedule
        if isinstance(schedule, Ramp) and schedule.end is None:
            found.append(f"objectives.{alias}.schedule ({schedule.kind} without end)")
    return found


def goes_on(folder: "RunFolder", config: TrainingConfig) -> bool:
    """Whether a folder holds the training of `config` with fewer steps, of which some are done.

    Nothing is written: `begin_leg` does it, once the training can go on.

    Raises:
        UserError: it holds one with more steps, nothing says what becomes of schedules that depend
            on `steps`, or the checkpoint that it would go on from was dropped.
    """
    held = _held_recipe(folder.recipe, config)
    if held is None or not folder.has_begun:
        return False
    if identity(held.model_copy(update={"steps": config.steps}), NUMBERLESS) != identity(
        config, NUMBERLESS
    ):
        return False
    done = folder.steps_done()
    if config.steps < held.steps:
        raise UserError(
            f"{folder.path} holds this run with {held.steps} steps, {done} of them trained: "
            f"steps={config.steps} is fewer, and no step is taken back: give steps={held.steps} or "
            "more, or choose another name"
        )
    _check_schedules(folder.path, config, held.steps, done)
    folder.check_resumable()
    return True


def begin_leg(folder: "RunFolder", config: TrainingConfig, step: int) -> SchedulePlan:
    """Makes `config` the recipe of a folder, if it has more steps, and gives the plan of its legs.

    The result of the steps so far is kept under a name of its own.

    Args:
        folder: whose lock this process holds.
        config: as `goes_on` has accepted it, or the folder's own.
        step: steps done.
    """
    held = _held_recipe(folder.recipe, config)
    if held is None or held.steps == config.steps:
        return plan_of(folder, config)
    if config.optim.resume_schedule is not None and not planned_by_steps(config):
        warn_once(
            f"optim.resume_schedule: {config.optim.resume_schedule}: it changes nothing, as no "
            "schedule of this recipe depends on steps"
        )
    legs = plan_of(folder, held).legs
    plan = SchedulePlan([*legs, _next_leg(config, step)])
    legs_json = [leg.model_dump(exclude_defaults=True) for leg in plan.legs]
    write_json(folder.path / HISTORY, {"legs": legs_json})
    if folder.result.exists():
        os.replace(folder.result, folder.earlier_result(held.steps))
    folder.write_recipe(config)  # last: from here on the leg counts
    return plan


def plan_of(folder: "RunFolder", config: TrainingConfig) -> SchedulePlan:
    """The legs of a folder's training, up to that which a recipe plans.

    Args:
        folder: of the training.
        config: the folder's recipe, or one that `goes_on` has accepted.

    Raises:
        UserError: `history.json` is damaged.
    """
    path = folder.path / HISTORY
    if not path.exists():
        return SchedulePlan.of(config)
    fix = "copy it back from elsewhere, or choose another name: it says how schedules were planned"
    try:
        legs = _LEGS.validate_python(read_json(path, fix=fix).get("legs"))
    except ValidationError:
        raise DamagedError(path, "it names no legs", fix) from None
    return SchedulePlan(leg for leg in legs if leg.steps <= config.steps)


def forget_earlier_ends(
    folder: "RunFolder",
    config: TrainingConfig,
    plan: SchedulePlan,
    first_row: Mapping[str, float],
) -> None:
    """Makes the log of a prolonged training that of one which was planned so from the start.

    The last step of an earlier leg is due at no other row than those of `tracking.log_every` and
    `checkpoint.every`. Done once all steps are: until then a resumed training may count on from it.

    Args:
        folder: of the training.
        config: its recipe.
        plan: of its legs; of a single one, nothing is done.
        first_row: what the row of step 0 says that depends on the number of steps.
    """
    if not plan.was_prolonged:
        return
    every = (config.tracking.log_every, config.checkpoint.every)
    ends = {leg.from_step for leg in plan.legs[1:]} - {config.steps}
    extra = {step for step in ends if all(step % number for number in every)}
    rows = [{**row, **first_row} if row["step"] == 0 else row for row in read_rows(folder.metrics)]
    *older, newest = step_folders(folder.checkpoints)
    for checkpoint in (*older, newest):  # first: a kill leaves no mark that does not fit the log
        mark_checkpoint(checkpoint, None)
    is_extra = [row["step"] in extra and "lr" in row for row in rows]
    write_rows(folder.metrics, [row for row, drop in zip(rows, is_extra, strict=True) if not drop])
    mark_checkpoint(newest, mark_log(folder.metrics))


def expected_plan(folder: "RunFolder", config: TrainingConfig) -> SchedulePlan:
    """The plan that `begin_leg` would give now; nothing is written."""
    held = _held_recipe(folder.recipe, config)
    if held is None or held.steps >= config.steps or not folder.has_begun:
        return plan_of(folder, config)
    return SchedulePlan([*plan_of(folder, held).legs, _next_leg(config, folder.steps_done())])


def take_back_result(folder: "RunFolder", config: TrainingConfig) -> None:
    """Undoes what a kill in `begin_leg` left: a result put aside, and no leg begun."""
    earlier = folder.earlier_result(config.steps)
    if not folder.result.exists() and earlier.exists() and folder.steps_done() == config.steps:
        os.replace(earlier, folder.result)


def _next_leg(config: TrainingConfig, step: int) -> Leg:
    said = config.optim.resume_schedule if planned_by_steps(config) else None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Leg(steps=config.steps, from_step=step, begun=now, resume_schedule=said)


def _held_recipe(path: Path, config: TrainingConfig) -> TrainingConfig | None:
    """The recipe of a folder; None if it is of another kind."""
    try:
        return validated(type(config), read_recipe(path, []), stored=True)
    except UserError:
        return None


def _check_schedules(folder: Path, config: TrainingConfig, planned: int, done: int) -> None:
    depending, said = planned_by_steps(config), config.optim.resume_schedule
    if not depending:
        return
    if said is None:
        raise UserError(
            f"{folder}: {' and '.join(depending)} was planned for {planned} steps, {done} of them "
            f"trained: to go on to {config.steps}, say optim.resume_schedule=stretch (planned "
            "anew) or keep (as it was, then its last value), or choose another name"
        )
    if said == "keep" and config.optim.schedule != "constant":
        raise UserError(
            f"optim.resume_schedule: keep: optim.schedule ({config.optim.schedule}) reaches a "
            f"learning rate of 0 after {planned} steps, so the others would train nothing: use "
            "stretch"
        )
