"""Steps to target: in what share of the baseline's steps a variant gets as low as the baseline.

The target of a seed is the baseline's validation flow loss after its last step. A variant reaches
it if its own last loss is at or below it: at the step at which its curve crosses the target.
Between evaluations the loss is linear in the logarithm of the step: it falls ever more slowly, so
that a line over the step itself lies above it and crosses too late. Where it crosses several
times, the middle between its first and its last crossing counts. The ratio of a seed is that step
over the baseline's steps.

This is right where nothing differs but noise. The variant then ends below the baseline in half of
the cases, so that half of the ratios are below 1, however large the wiggles are; noise that puts
the first crossing too early puts the last one too late. The first crossing alone favours wiggly
curves, also where the baseline is held to it; see docs/statistics.md.

A variant that ends above the target has a ratio that is known to be larger than its steps over
the baseline's. Such a seed is kept: the statistics are of log ratios, right-censored
(`censored.CensoredSample`).
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from alignlab.experiments.compare.result import Comparison, Curve
from alignlab.experiments.report.censored import CensoredSample
from alignlab.experiments.report.formatting import DASH, format_interval, format_number
from alignlab.experiments.report.statistics import (
    MIN_PAIRS,
    Method,
    Paired,
    detectable_difference,
    holm,
    holm_levels,
    without_rounding,
)

TARGET = "val/flow"
_EARLY = 0.8  # of the baseline's steps
_FEW = 8  # evaluations
_HOW_TO = (
    "Steps to target (how much sooner a variant is where the baseline ends) are not known: "
    "validation during training was off; eval.every=N turns it on, every N steps."
)


@dataclass(frozen=True)
class StepsToTarget:
    """How soon one variant reaches the baseline's last validation loss.

    Args:
        ratios: by seed, the variant's step over the baseline's; of a seed in `never`, what the
            ratio is larger than. Seeds without evaluations during training are not in it.
        never: seeds with which the variant ends above it.
        at_first: seeds with which it is there at its first evaluation, so perhaps earlier.
        paired: statistics of the natural logarithm of the ratios. Its interval is that of Student's
            t, for censored numbers where there are any ("censored t"). None for the baseline;
            without interval where fewer than `MIN_PAIRS` seeds reach it, or all in the same share.
        detectable: smallest true mean of the log ratios that would be found, as
            `Paired.detectable`: 0.1 is a ratio of 0.90, or of 1.11. None where a seed is in
            `never`: how much a test finds of numbers of which some are only bounds depends on where
            the bounds lie.
    """

    ratios: dict[int, float]
    never: tuple[int, ...] = ()
    at_first: tuple[int, ...] = ()
    paired: Paired | None = None
    detectable: float | None = None

    @property
    def mean(self) -> float | None:
        """Geometric mean of the ratios, the most likely one; see `is_bound`."""
        if self.paired is not None:
            return _exp(self.paired.mean)
        return statistics.geometric_mean(self.ratios.values()) if self.ratios else None

    @property
    def is_bound(self) -> bool:
        """Whether `mean` is only what the geometric mean of these seeds is larger than."""
        return bool(self.never) and self.interval is None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the geometric mean; None where `paired` has none."""
        if self.paired is None or self.paired.low is None or self.paired.high is None:
            return None
        return _exp(self.paired.low), _exp(self.paired.high)

    @property
    def is_undetected(self) -> bool:
        """Whether there is an interval that excludes no change, and the ratios are not all 1."""
        if self.paired is None or self.interval is None:
            return False
        return not self.paired.is_claimed and not self.paired.is_equal

    @property
    def text(self) -> str:
        """The mean as shown: "0.71", or "> 1.00" of a bound."""
        mean = self.mean
        if mean is None:
            return DASH
        if not 0.01 <= mean < 100.0:
            number = format_number(mean)
        else:
            number = f"{mean:.2f}" if mean >= 0.1 else f"{mean:.3f}"
        return f"> {number}" if self.is_bound else number

    @property
    def never_text(self) -> str:
        """ "never in 2/5", or empty."""
        return f"never in {len(self.never)}/{len(self.ratios)}" if self.never else ""

    @property
    def never_words(self) -> str:
        """ "2 of 5 seeds never reached it", or empty."""
        if not self.never:
            return ""
        return f"{len(self.never)} of {len(self.ratios)} seeds never reached it"

    @property
    def change_text(self) -> str:
        """The change of steps and its interval: "-29% [-38%, -19%]"; a dash where none is known."""
        if self.paired is None or self.is_bound:
            return DASH
        change = 100.0 * math.expm1(self.paired.mean)
        if self.interval is None or self.paired.is_equal:
            return f"{format_number(change, sign=True)}%"
        low, high = (100.0 * (end - 1.0) for end in self.interval)
        return format_interval(change, low, high, sign=True, unit="%")

    @property
    def is_ever_reached(self) -> bool:
        """Whether any seed reaches the target."""
        return len(self.never) < len(self.ratios)

    @property
    def num_sooner(self) -> int:
        """With how many seeds it is surely there before the baseline."""
        return sum(ratio < 1.0 for seed, ratio in self.ratios.items() if seed not in self.never)

    @property
    def why_unknown(self) -> str:
        """Why there is no interval; empty where there is one."""
        if self.interval is not None:
            return ""
        if len(self.ratios) < MIN_PAIRS:
            return f"known with {len(self.ratios)} seeds"
        if self.is_bound:
            return f"{self.never_words}: more than {self.text.removeprefix('> ')} in the mean"
        return f"{self.change_text} with every seed: no spread to judge it by"


def steps_to_target(comparison: Comparison) -> dict[str, StepsToTarget]:
    """Of every variant, the baseline included, with Holm's correction over the others.

    Empty where no seed has evaluations of baseline and variant during training.
    """
    others = [variant for variant in comparison.variants if variant != comparison.baseline]
    found = {variant: _by_seed(comparison, variant) for variant in comparison.variants}
    if not any(found[variant].ratios for variant in others):
        return {}
    samples = {v: _sample(found[v]) for v in others}
    tested = {v: sample for v, sample in samples.items() if sample is not None}
    p_values = [sample.p_value() for sample in tested.values()]
    corrected, levels = holm(p_values), holm_levels(p_values)
    decided = dict(zip(tested, zip(p_values, corrected, levels, strict=True), strict=True))
    for variant in others:
        paired, detectable = _paired(found[variant], samples[variant]), None
        if paired is not None and variant in decided:
            p_value, holm_p, level = decided[variant]
            low, high = tested[variant].interval(level)
            paired = dataclasses.replace(
                paired, p_value=p_value, holm_p=holm_p, low=low, high=high, confidence=1.0 - level
            )
            if not found[variant].never and paired.std is not None:
                detectable = detectable_difference(paired.std, paired.num_pairs, len(tested))
        found[variant] = dataclasses.replace(found[variant], paired=paired, detectable=detectable)
    return found


def steps_footnotes(comparison: Comparison, found: Mapping[str, StepsToTarget]) -> list[str]:
    """How steps to target were found and what is not known of them, or how to get them."""
    if not found:
        return [_HOW_TO] if _could_evaluate(comparison) else []
    base = comparison.baseline
    text = (
        f"Steps to target: where the validation flow loss gets to that of {base} after its last "
        f"step with the same seed, over the steps of {base}; geometric mean over seeds. Between "
        "evaluations the loss is linear in the logarithm of the step; of several crossings, the "
        "middle between the first and the last."
    )
    never = {v: steps.never for v, steps in found.items() if steps.never}
    if never:
        text += (
            f" Never reached, which is to end above it: {_listed(found, never)}. Such a seed "
            "counts as more than its last step (right-censored)."
        )
    at_first = {v: steps.at_first for v, steps in found.items() if steps.at_first}
    if at_first:
        text += (
            f" At the first evaluation already, so perhaps earlier: {_listed(found, at_first)}. "
            "A smaller eval.every would tell."
        )
    early = _early(comparison)
    if early:
        listed = ", ".join(f"{share:.0%} (seed {seed})" for seed, share in early.items())
        text += (
            f" {base} itself was as low as at its end long before: after {listed} of its steps. "
            "Its curve is flat, wiggly or rising there, and a ratio says little."
        )
    few = min(len(_curve(comparison, base, seed)) for seed in found[base].ratios)
    if few < _FEW:
        text += (
            f" There are {few} evaluations: between so few a ratio is less exact. A smaller "
            f"eval.every, for {_FEW} or more, tells it better."
        )
    return [text]


def _early(comparison: Comparison) -> dict[int, float]:
    """Seeds with which the baseline's loss was at its last value before 80% of its steps."""
    shares = {}
    for seed in comparison.seeds:
        target, curve = target_of(comparison, seed), _curve(comparison, comparison.baseline, seed)
        if target is not None:
            first = next(step for step, value in curve if value <= target)
            shares[seed] = first / curve[-1][0]
    return {seed: share for seed, share in shares.items() if share < _EARLY}


def _listed(found: Mapping[str, StepsToTarget], seeds: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(
        f"{variant} with {len(which)} of {len(found[variant].ratios)} seeds "
        f"({', '.join(map(str, which))})"
        for variant, which in seeds.items()
    )


def crossing(curve: Curve, target: float) -> float | None:
    """The step at which a curve reaches the target, at least 1; None if it ends above it.

    Where it crosses the target several times, the middle between its first and its last crossing;
    a curve that ends exactly at the target, as the baseline's does, reaches it at its last step.

    >>> crossing(((10, 0.5), (20, 0.4), (30, 0.5)), 0.42)
    >>> round(crossing(((10, 0.5), (40, 0.3)), 0.4), 6)
    20.0
    """
    last_step, last_value = curve[-1]
    if last_value == target:
        return max(float(last_step), 1.0)
    below = [math.isfinite(value) and value <= target for _, value in curve]
    if not below[-1]:
        return None
    first = below.index(True)
    stays = len(below) - below[::-1].index(False) if False in below else 0
    places = (_crossing_before(curve, place, target) for place in (first, stays))
    return max(statistics.fmean(places), 1.0)


def _crossing_before(curve: Curve, place: int, target: float) -> float:
    """Where the curve, from the evaluation before one that is below the target, crosses it.

    Of the first evaluation, and after one that is not finite, it is the evaluation's own step.
    From a step 0, which has no logarithm, the loss is linear in the step.
    """
    step, value = curve[place]
    if place == 0 or not math.isfinite(curve[place - 1][1]):
        return float(step)
    earlier_step, earlier = curve[place - 1]
    # fractions: no difference of floats overflows or vanishes
    above, below = Fraction(earlier) - Fraction(target), Fraction(earlier) - Fraction(value)
    if earlier_step <= 0:
        return float(earlier_step + (step - earlier_step) * above / below)
    found: float = earlier_step * (step / earlier_step) ** float(above / below)
    return min(found, float(step))


def target_of(comparison: Comparison, seed: int) -> float | None:
    """The baseline's last validation loss with a seed, if it was evaluated during training."""
    curve = _curve(comparison, comparison.baseline, seed)
    is_known = bool(curve) and curve[-1][0] > 0 and math.isfinite(curve[-1][1])
    return curve[-1][1] if is_known else None


def _could_evaluate(comparison: Comparison) -> bool:
    """Whether the recipe has the setting, and leaves it off: older ones do not have it."""
    match = re.search(r"^eval:\n(?:[ ].*\n)*?  every: null$", comparison.recipe, re.MULTILINE)
    return match is not None and len(comparison.variants) > 1


def _curve(comparison: Comparison, variant: str, seed: int) -> Curve:
    run = comparison.run(variant, seed)
    return () if run is None else run.measured.get(TARGET, ())


def _by_seed(comparison: Comparison, variant: str) -> StepsToTarget:
    ratios, never, at_first = {}, [], []
    for seed in comparison.seeds:
        target, curve = target_of(comparison, seed), _curve(comparison, variant, seed)
        if target is None or not curve:
            continue
        step = crossing(curve, target)
        if step is None:
            never.append(seed)
            step = max(float(curve[-1][0]), 1.0)
        elif step <= curve[0][0]:
            at_first.append(seed)
        ratios[seed] = step / _curve(comparison, comparison.baseline, seed)[-1][0]
    return StepsToTarget(ratios, tuple(never), tuple(at_first))


def _sample(steps: StepsToTarget) -> CensoredSample | None:
    """The log ratios, if they are enough for an interval and have a spread to make it of."""
    known = [_log(ratio) for seed, ratio in steps.ratios.items() if seed not in steps.never]
    bounds = [_log(ratio) for seed, ratio in steps.ratios.items() if seed in steps.never]
    if len(known) < MIN_PAIRS or without_rounding(max(known) - min(known), 1.0) == 0.0:
        return None
    return CensoredSample(np.asarray(known), np.asarray(bounds))


def _paired(steps: StepsToTarget, sample: CensoredSample | None) -> Paired | None:
    """Mean and spread of the log ratios, without what the correction decides."""
    if sample is not None:
        method: Method = "censored t" if steps.never else "t"
        return Paired(sample.size, sample.mean, sample.std, method=method)
    if not steps.ratios:
        return None
    logs = [_log(ratio) for ratio in steps.ratios.values()]
    mean = without_rounding(statistics.fmean(logs), 1.0)
    is_equal = not steps.never and len(logs) >= MIN_PAIRS  # or there would be a sample
    end = 0.0 if is_equal and mean == 0.0 else None
    return Paired(len(logs), mean, 0.0 if is_equal else None, low=end, high=end)


def _log(ratio: float) -> float:
    return without_rounding(math.log(ratio), 1.0)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf
