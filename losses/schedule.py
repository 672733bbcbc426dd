"""How the weight of an objective changes over training steps."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Constant(BaseModel):
    """Factor 1 at every step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["constant"] = "constant"


class Ramp(BaseModel):
    """Factor 1 up to step `start`, `final` from step `end` on, and between them a line or half a
    cosine wave. `end=None` means the end of the run."""

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
    """Factor 1 before `step`, 0 from `step` on (HASTE's hard stop, arXiv 2505.16792)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["stop_at"]
    step: int = Field(ge=0)


def _spelled_out(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


# In a recipe: "constant", "linear", "cosine", or a mapping with the kind and its own settings,
# e.g. {kind: linear, start: 0, end: 1000, final: 0.1} or {kind: stop_at, step: 2500}.
Schedule = Annotated[
    Constant | Ramp | StopAt, Field(discriminator="kind"), BeforeValidator(_spelled_out)
]


def weight_at(schedule: Schedule, step: int, total_steps: int | None = None) -> float:
    """Computes the factor on an objective's weight at `step` (0-based).

    Args:
        schedule: from the objective's config.
        step: training step.
        total_steps: length of the run; needed by a ramp that does not say where it ends.

    Raises:
        ValueError: a ramp without an end was given no `total_steps`.
    """
    match schedule:
        case Constant():
            return 1.0
        case StopAt():
            return 1.0 if step < schedule.step else 0.0
        case Ramp():
            end = total_steps if schedule.end is None else schedule.end
            if end is None:
                raise ValueError(f"a {schedule.kind} schedule without `end` needs total_steps")
            done = (step - schedule.start) / max(end - schedule.start, 1)
            done = min(max(done, 0.0), 1.0)
            if schedule.kind == "cosine":
                done = (1.0 - math.cos(math.pi * done)) / 2.0
            return 1.0 + (schedule.final - 1.0) * done
