"""Validation losses of runs that nobody trained: a falling curve, and noise of several kinds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alignlab.experiments.compare.result import Curve
from alignlab.experiments.report.steps_to_target import crossing

STEPS = 2000
Logs = tuple[list[float], list[float]]
"""Log ratios of one comparison: those that are known, and the bounds of the others."""


Rule = Callable[[Curve, float], float | None]
"""The step at which a curve reaches a target."""


@dataclass(frozen=True)
class Noise:
    """Standard deviations of what a run's validation loss differs by, and the steps between.

    Args:
        drift: of level and drift together.
        wiggle: of the wiggle, of the variant.
        base_wiggle: of the baseline.
        every: `eval.every`.
    """

    drift: float
    wiggle: float
    base_wiggle: float
    every: int


def loss_curve(rng: np.random.Generator, noise: Noise, wiggle: float, ratio: float) -> Curve:
    """One run's validation losses."""
    steps = np.arange(noise.every, STEPS + 1, noise.every)
    kept = 0.9 ** (noise.every / 100)
    drift = [rng.standard_normal()]
    for _ in steps[1:]:
        drift.append(kept * drift[-1] + math.sqrt(1 - kept**2) * rng.standard_normal())
    level = math.sqrt(0.5) * rng.standard_normal()
    values = 0.35 + 0.14 * (steps / ratio / 500) ** -0.85
    values += noise.drift * (level + math.sqrt(0.5) * np.asarray(drift))
    values += wiggle * rng.standard_normal(len(steps))
    return tuple(zip(steps.tolist(), values.tolist(), strict=True))


def logs_of_curves(
    rng: np.random.Generator,
    num_seeds: int,
    noise: Noise,
    ratio: float,
    rule: Rule = crossing,
    *,
    first_of_both: bool = False,
) -> Logs:
    """Log ratios of `num_seeds` pairs of runs; `first_of_both` holds the baseline to the rule."""
    bases = [loss_curve(rng, noise, noise.base_wiggle, 1.0) for _ in range(num_seeds)]
    return logs_against(rng, bases, noise, ratio, rule, first_of_both=first_of_both)


def logs_against(
    rng: np.random.Generator,
    bases: list[Curve],
    noise: Noise,
    ratio: float,
    rule: Rule = crossing,
    *,
    first_of_both: bool = False,
) -> Logs:
    """Log ratios of a variant's runs over those of the baseline."""
    known, bounds = [], []
    for base in bases:
        target = base[-1][1]
        steps = rule(base, target) if first_of_both else STEPS
        assert steps is not None
        step = rule(loss_curve(rng, noise, noise.wiggle, ratio), target)
        if step is None:
            bounds.append(math.log(STEPS / steps))
        else:
            known.append(math.log(step / steps))
    return known, bounds
