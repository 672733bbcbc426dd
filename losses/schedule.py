"""How the weight of an objective changes over training steps."""

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor, nn


class Constant(BaseModel):
    """Factor 1 at every step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["constant"] = "constant"


class Ramp(BaseModel):
    """Factor 1 up to step `start`, `final` from step `end` on, and between them a line or half a
    cosine wave.

    Args:
        start: last step at factor 1.
        end: first step at `final`. Left out: the end of the run.
        final: factor from `end` on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["linear", "cosine"]
    start: int = Field(default=0, ge=0)
    end: int | None = None
    final: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> "Ramp":
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end ({self.end}) must be after start ({self.start})")
        return self


class StopAt(BaseModel):
    """Factor 1 before `step`, 0 from `step` on (HASTE's hard stop, arXiv 2505.16792).

    Args:
        step: the first one without the objective.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["stop_at"]
    step: int = Field(ge=0)


class StopAtPlateau(BaseModel):
    """Factor 1 until the objective's similarity stops rising, then 0 for good.

    HASTE (arXiv 2505.16792) stops at a step found by trial; this finds the step in the run. What
    is watched is the mean similarity of a whole step or, of an objective without one, minus its
    mean loss. The defaults are alignlab's.

    Args:
        decay: of the exponential moving average of the watched value, which begins at its first
            value.
        patience: steps without a new best average after which it stops; several times
            1 / (1 - decay), or the noise of the first steps may stop it.
        min_delta: how far above the best an average has to be to be a new best.
        start: first step that is watched.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["stop_at_plateau"]
    decay: float = Field(default=0.99, ge=0.0, lt=1.0)
    patience: int = Field(default=500, ge=1)
    min_delta: float = Field(default=1e-3, ge=0.0, allow_inf_nan=False)
    start: int = Field(default=0, ge=0)


def _spelled_out(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


# In a recipe: "constant", "linear", "cosine", or a mapping with the kind and its own settings,
# e.g. {kind: linear, start: 0, end: 1000, final: 0.1} or {kind: stop_at, step: 2500}.
Schedule = Annotated[
    Constant | Ramp | StopAt | StopAtPlateau,
    Field(discriminator="kind"),
    BeforeValidator(_spelled_out),
]


def weight_at(
    schedule: Schedule, step: int, total_steps: int | None = None, *, stopped: bool = False
) -> float:
    """Computes the factor on an objective's weight at `step` (0-based).

    Args:
        schedule: from the objective's config.
        step: training step.
        total_steps: length of the run; needed by a ramp that does not say where it ends.
        stopped: what the `PlateauWatch` of a `stop_at_plateau` says; no other kind reads it.

    Raises:
        ValueError: a ramp without an end was given no `total_steps`.
    """
    match schedule:
        case Constant():
            return 1.0
        case StopAt():
            return 1.0 if step < schedule.step else 0.0
        case StopAtPlateau():
            return 0.0 if stopped else 1.0
        case Ramp():
            end = total_steps if schedule.end is None else schedule.end
            if end is None:
                raise ValueError(f"a {schedule.kind} schedule without `end` needs total_steps")
            done = (step - schedule.start) / max(end - schedule.start, 1)
            done = min(max(done, 0.0), 1.0)
            if schedule.kind == "cosine":
                done = (1.0 - math.cos(math.pi * done)) / 2.0
            return 1.0 + (schedule.final - 1.0) * done


def warmup_at(warmup: int, step: int) -> float:
    """Computes the factor on an objective's weight that grows over the first steps of a run.

    `(step + 1) / warmup`, and 1 from step `warmup - 1` (0-based) on: the first step counts too.

    Args:
        warmup: number of steps; 0: none.
        step: training step.
    """
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


class PlateauWatch(nn.Module):
    """Decides when a `StopAtPlateau` stops. All that it remembers is in its buffers, in float64.

    They may be on a GPU. The host waits for them only where it may have stopped: having looked, it
    knows how many steps are missing to the patience, and goes on for so many without looking.

    Args:
        schedule: from the objective's config.
    """

    average: Tensor
    best: Tensor
    waited: Tensor

    def __init__(self, schedule: StopAtPlateau) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("average", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("best", torch.tensor(-math.inf, dtype=torch.float64))
        self.register_buffer("waited", torch.tensor(0))
        self._missing, self._has_stopped = schedule.patience, False
        self.register_load_state_dict_post_hook(PlateauWatch._look_again)  # type: ignore[no-untyped-call]

    @property
    def stopped(self) -> bool:
        """Whether it has stopped, which no step takes back."""
        if self._missing <= 0 and not self._has_stopped:
            self._missing = self.schedule.patience - int(self.waited)
            self._has_stopped = self._missing <= 0
        return self._has_stopped

    @torch.no_grad()
    def see(self, step: int, value: Tensor, is_there: Tensor) -> None:
        """Takes in the watched value of a step.

        Args:
            step: training step.
            value: a scalar on any device.
            is_there: a bool; a step without a value is left out.
        """
        if self.stopped or step < self.schedule.start:
            return
        decay, value, is_there = (
            self.schedule.decay,
            value.to(self.average),
            is_there.to(self.average.device),
        )
        average = decay * self.average + (1.0 - decay) * value
        average = torch.where(self.average.isnan(), value, average)
        is_best = average > self.best + self.schedule.min_delta
        waited = torch.where(is_best, 0, self.waited + 1)
        self.average.copy_(torch.where(is_there, average, self.average))
        self.best.copy_(torch.where(is_there & is_best, average, self.best))
        self.waited.copy_(torch.where(is_there, waited, self.waited))
        self._missing -= 1

    def wait_anew(self) -> None:
        """Takes back that it has stopped, for what measures a step with all objectives at work."""
        self.waited.zero_()
        self._missing, self._has_stopped = self.schedule.patience, False

    def _look_again(self, _: object) -> None:
        self._missing, self._has_stopped = 0, False
