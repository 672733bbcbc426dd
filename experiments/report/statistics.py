"""Is a difference to the baseline real? Paired statistics over seeds, in one place.

A pair is one seed: the variant's number minus the baseline's. **A change is claimed where the
interval of its mean excludes 0**, and nowhere else; of runs that diverged, never. The interval is
that of the test at the level at which Holm's correction over the variants decides: 5% over the
number of variants that are not told apart before it, so it is as wide as the 95% interval or wider.
In at most 5% of comparisons does any interval of a metric exclude 0 where there is no effect. That
all intervals hold their true differences at once is not promised: Bonferroni's would, and would
find fewer changes.

The methods depend on how many pairs there are, because what suits many is wrong for few:

- Fewer than `MIN_PAIRS`: no interval and no p-value.
- Fewer than `BOOTSTRAP_PAIRS`: Student's t. A bootstrap of five numbers is too narrow (its 95%
  intervals hold the truth in 84% of cases), and a sign flip of n pairs cannot give a p-value below
  2 / 2**n: 0.25 of three, 0.06 of five, so that exact tests of few seeds claim nothing.
- From there on: the sign-flip permutation test. The interval holds every difference that the test
  does not reject at Holm's level, and the 95% BCa bootstrap interval, at a level widened for the
  sample size, which is the better one of skewed differences. A p-value of 5% or less alone is then
  no claim: of ten simulated pairs without effect, the two disagree in 1 to 3 of 100 cases.

On normal differences, and from ten pairs also on skewed ones, the intervals hold the truth in 92%
to 97% of cases where one variant is tested, and in more where several are. With few pairs and a
skewness of 2 it is 88%; no method does better there. Under no effect the differences are symmetric,
and a false claim among five variants comes up in at most 6% of cases.
`tests/experiments/report/test_statistics_errors.py` simulates all this.

Letters: R rows, each a variant of its own; N pairs; S subsets of pairs.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

ALPHA = 0.05
POWER = 0.8
MIN_PAIRS = 3  # two pairs agree by luck too often, above all on counts
BOOTSTRAP_PAIRS = 10
MOST_PAIRS = 10_000
_RESAMPLES = 9999  # scipy's default; odd plus one makes p-values and quantiles exact fractions
_EXACT_PAIRS = 13  # up to which all signs can be flipped, with no more patterns than resamples
_CUBABLE = 300  # powers of 2: cubes of such numbers, as BCa takes, and sums of them fit
_ROUNDING = 16 * sys.float_info.epsilon

Method = Literal["t", "bootstrap", "censored t", "none"]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """What the paired differences of one variant and one metric say.

    Args:
        num_pairs: seeds that variant and baseline share.
        mean, std: of the differences; std is the sample's (n - 1), None with one pair.
        low, high: interval of the mean, which excludes 0 exactly where a change is claimed; None
            below `MIN_PAIRS`, or with equal differences other than zero, whose spread is not known.
        confidence: of the interval: 95%, or more where several variants are tested.
        method: how interval and p-value were made: "t", "bootstrap" (and sign flip), "censored t"
            (of `censored`), "none".
        p_value: two-sided, of `method`; the sign flip's when all differences are equal.
        sign_flip_p: two-sided p-value of the sign-flip permutation test, exact up to 13 pairs.
        holm_p: `p_value` after Holm's correction over the variants of the metric.
        effect_size: Hedges' g, the mean in standard deviations of the differences, corrected for
            few pairs; None below three pairs or without spread.
        detectable: smallest true difference that would be found with 80% power at the level that
            one of all variants must pass (5% / variants), at the observed spread. None: cannot
            tell.
    """

    num_pairs: int
    mean: float
    std: float | None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    method: Method = "none"
    p_value: float | None = None
    sign_flip_p: float | None = None
    holm_p: float | None = None
    effect_size: float | None = None
    detectable: float | None = None

    @property
    def is_equal(self) -> bool:
        """Whether the variant has the baseline's number with every seed."""
        return self.mean == 0.0 and self.std == 0.0

    @property
    def is_claimed(self) -> bool:
        """Whether a difference may be claimed: its interval excludes 0."""
        if self.low is None or self.high is None:
            return False
        return self.low > 0.0 or self.high < 0.0


def paired_statistics(
    differences: Mapping[str, Sequence[float]], scales: Mapping[str, float]
) -> dict[str, Paired]:
    """Statistics of one metric for every variant, Holm-corrected over those that have a p-value.

    Args:
        differences: variant to its differences to the baseline, one per shared seed; a variant
            with none, or with one that is not finite, gets no statistics.
        scales: variant to the largest magnitude of the numbers that were subtracted; see
            `without_rounding`.
    """
    usable = {
        variant: [without_rounding(value, scales[variant]) for value in values]
        for variant, values in differences.items()
        if values and all(math.isfinite(value) for value in values)
    }
    num_tests = sum(len(values) >= MIN_PAIRS for values in usable.values())
    # powers of numbers far from 1 overflow: those are divided by a power of 2, which is exact
    shifts = {variant: _shift(values) for variant, values in usable.items()}
    usable = {v: [_scaled(x, -shifts[v]) for x in values] for v, values in usable.items()}
    paired = {
        v: _paired(values, _scaled(scales[v], -shifts[v]), num_tests)
        for v, values in usable.items()
    }
    tested = {v: one.p_value for v, one in paired.items() if one.p_value is not None}
    p_values = list(tested.values())
    for variant, holm_p, level in zip(tested, holm(p_values), holm_levels(p_values), strict=True):
        one = dataclasses.replace(paired[variant], holm_p=holm_p)
        paired[variant] = _with_interval(one, usable[variant], level)
    return {variant: _unshifted(one, shifts[variant]) for variant, one in paired.items()}


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation of finite numbers of any size; no spread of one number.

    >>> mean_and_std([1.7e308, 1.7e308]), mean_and_std([2.0])
    ((1.7e+308, 0.0), (2.0, None))
    """
    shift = _shift(values)
    scaled = [_scaled(value, -shift) for value in values]
    mean = _scaled(statistics.fmean(scaled), shift)
    return mean, _scaled(statistics.stdev(scaled), shift) if len(values) > 1 else None


def without_rounding(value: float, scale: float) -> float:
    """0 for a difference of numbers of magnitude `scale` that is only their rounding.

    >>> without_rounding(-6.9e-18, 0.11), without_rounding(1e-9, 0.11)
    (0.0, 1e-09)
    """
    return 0.0 if abs(value) <= _ROUNDING * scale < math.inf else value


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, which bounds the chance of any false claim among them.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        corrected[place] = min(largest, 1.0)
    return corrected


def holm_levels(p_values: Sequence[float]) -> list[float]:
    """The level at which Holm's correction decides on each p-value.

    Those that pass have the level of their step, all others that of the first step that fails, so
    that a p-value is at or below its level exactly if Holm's correction leaves it at 5% or less.

    >>> [round(level, 4) for level in holm_levels([0.2, 0.001, 0.03, 0.01])]
    [0.025, 0.0125, 0.025, 0.0167]
    """
    corrected = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    passed = sum(value <= ALPHA for value in corrected)
    levels = [0.0] * len(p_values)
    for rank, place in enumerate(order):
        levels[place] = ALPHA / (len(p_values) - min(rank, passed))
    return levels


def detectable_difference(std: float, num_pairs: int, num_tests: int = 1) -> float:
    """Smallest true mean difference that a paired t-test finds with 80% power.

    Args:
        std: standard deviation of the differences.
        num_pairs: at least 2.
        num_tests: the two-sided level is 5% divided by this, Holm's first and hardest step.
    """
    return _noncentrality(num_pairs, ALPHA / num_tests) * std / math.sqrt(num_pairs)


def pairs_needed(std: float, difference: float, num_tests: int = 1) -> int | None:
    """Fewest pairs, at least `MIN_PAIRS`, of which `detectable_difference` is no larger.

    Args:
        std: standard deviation of the differences.
        difference: true mean difference that is to be found with 80% power; above 0.
        num_tests: as `detectable_difference` has it.

    Returns:
        None for more than `MOST_PAIRS`.
    """

    def suffices(num_pairs: int) -> bool:
        return detectable_difference(std, num_pairs, num_tests) <= difference

    too_few, enough = MIN_PAIRS - 1, MIN_PAIRS
    while not suffices(enough):
        too_few, enough = enough, 2 * enough
        if too_few > MOST_PAIRS:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if suffices(middle) else (middle, enough)
    return enough if enough <= MOST_PAIRS else None


def interval(values_RN: Array, method: Method, level: float = ALPHA) -> tuple[Array, Array]:
    """Ends of the interval of each row's mean, (R,); the numbers of a row are not all equal.

    It excludes 0 only where `p_value` is at most `level`, and for "t" always there.
    """
    num_values = values_RN.shape[-1]
    if method == "t":
        half_R = stats.t.ppf(1 - level / 2, num_values - 1) * stats.sem(values_RN, axis=-1)
        mean_R = values_RN.mean(-1)
        return mean_R - half_R, mean_R + half_R
    # A bootstrap spreads by the standard deviation with n and has normal tails; widening its level
    # gives it those of n - 1 and of t (Hesterberg's expanded percentile interval).
    quantile = stats.t.ppf(1 - ALPHA / 2, num_values - 1)
    widened = quantile * math.sqrt(num_values / (num_values - 1))
    ends = stats.bootstrap(
        (values_RN,),
        np.mean,
        axis=-1,
        method="BCa",
        confidence_level=1 - 2 * stats.norm.sf(widened),
        n_resamples=_RESAMPLES,
        batch=_batch(values_RN),
        rng=0,
    ).confidence_interval
    low_R, high_R = _not_rejected(values_RN, level)
    # the bootstrap has no interval where almost all numbers are equal
    return np.fmin(ends.low, low_R), np.fmax(ends.high, high_R)


def p_value(values_RN: Array, method: Method) -> Array:
    """Two-sided p-value of each row's mean, (R,): Student's t or, for "bootstrap", sign flips."""
    if method == "t":
        return np.asarray(stats.ttest_1samp(values_RN, 0.0, axis=-1).pvalue)
    means_RS = _subset_means(values_RN)
    # flipping a subset leaves as large a sum exactly if the subset's own sum is not positive
    fewest_R = np.minimum((means_RS <= 0.0).sum(-1), (means_RS >= 0.0).sum(-1))
    p_R: Array = np.minimum(2.0 * (1 + fewest_R) / (1 + means_RS.shape[-1]), 1.0)
    return p_R


def _not_rejected(values_RN: Array, level: float) -> tuple[Array, Array]:
    """Ends, (R,), of all that may be taken from a row so that sign flips give p above `level`.

    Those are means of subsets (Hartigan's typical values): taking one away moves the subset's own
    sum through 0.
    """
    means_RS = np.sort(_subset_means(values_RN), axis=-1)
    place = math.floor(level * (1 + means_RS.shape[-1]) / 2 + 1e-9) - 1
    if place < 0:
        raise ValueError(f"{values_RN.shape[-1]} pairs have no sign-flip interval at level {level}")
    return means_RS[:, place], means_RS[:, -1 - place]


def _subset_means(values_RN: Array) -> Array:
    """Mean of every subset of a row that is not empty, (R, S); of many pairs, of random ones."""
    num_values = values_RN.shape[-1]
    if num_values <= _EXACT_PAIRS:
        inside_SN = np.arange(1, 2**num_values)[:, None] >> np.arange(num_values) & 1
    else:
        inside_SN = np.random.default_rng(0).integers(0, 2, (_RESAMPLES, num_values))
        inside_SN = inside_SN[inside_SN.any(-1)]
    means_RS = values_RN @ (inside_SN / inside_SN.sum(-1, keepdims=True)).T
    rounding_R = _ROUNDING * np.abs(values_RN).max(-1)
    return np.where(np.abs(means_RS) <= rounding_R[:, None], 0.0, means_RS)


def method_for(num_pairs: int, num_tests: int) -> Method:
    """How so many pairs are tested when the smallest of `num_tests` p-values decides first."""
    # With very many variants not even the smallest sign-flip p-value passes Holm's first step.
    can_pass = num_tests * 2.0 ** (1 - num_pairs) <= ALPHA
    return "bootstrap" if num_pairs >= BOOTSTRAP_PAIRS and can_pass else "t"


def _shift(values: Sequence[float]) -> int:
    """The power of 2 of the largest number, where cubes of such numbers would not fit."""
    largest = max(map(abs, values))
    exponent = math.frexp(largest)[1]
    return 0 if largest == 0.0 or abs(exponent) < _CUBABLE else exponent


def _scaled(value: float, shift: int) -> float:
    """The number times a power of 2; infinite where that is too large."""
    try:
        return math.ldexp(value, shift) if shift else value
    except OverflowError:
        return math.copysign(math.inf, value)


def _unshifted(one: Paired, shift: int) -> Paired:
    """The statistics of numbers that were divided by a power of 2."""
    sizes = ("mean", "std", "low", "high", "detectable")
    known = {name: value for name in sizes if (value := getattr(one, name)) is not None}
    changes: dict[str, Any] = {name: _scaled(value, shift) for name, value in known.items()}
    return dataclasses.replace(one, **changes)


def _paired(values: list[float], scale: float, num_tests: int) -> Paired:
    """Everything but what the correction over the variants decides."""
    num_pairs = len(values)
    mean = without_rounding(statistics.fmean(values), scale)
    if num_pairs < 2:
        return Paired(num_pairs, mean, None)
    std = without_rounding(statistics.stdev(values), scale)
    if num_pairs < MIN_PAIRS:
        return Paired(num_pairs, mean, std)
    row_N = np.asarray([values])
    flipped = float(p_value(row_N, "bootstrap")[0])
    if std == 0.0:
        return Paired(num_pairs, mean, std, p_value=flipped, sign_flip_p=flipped)
    method = method_for(num_pairs, num_tests)
    return Paired(
        num_pairs,
        mean,
        std,
        method=method,
        p_value=flipped if method == "bootstrap" else float(p_value(row_N, "t")[0]),
        sign_flip_p=flipped,
        effect_size=mean / std * _small_sample(num_pairs),
        detectable=detectable_difference(std, num_pairs, num_tests),
    )


def _with_interval(one: Paired, values: list[float], level: float) -> Paired:
    if one.std == 0.0:
        limit = 0.0 if one.mean == 0.0 else None
        return dataclasses.replace(one, low=limit, high=limit)
    low_R, high_R = interval(np.asarray([values]), one.method, level)
    return dataclasses.replace(
        one, low=float(low_R[0]), high=float(high_R[0]), confidence=1.0 - level
    )


def _batch(values_RN: Array) -> int:
    """Resamples at a time, so that many rows do not fill the memory."""
    return max(1, 2**22 // values_RN.size)


def _small_sample(num_pairs: int) -> float:
    """Hedges' exact factor, by which a standardised mean of few pairs is too large."""
    half = (num_pairs - 1) / 2
    return math.exp(special.gammaln(half) - special.gammaln(half - 0.5)) / math.sqrt(half)


@lru_cache
def _noncentrality(num_pairs: int, level: float) -> float:
    degrees = num_pairs - 1
    threshold = float(stats.t.isf(level / 2, degrees))

    def missing(center: float) -> float:
        # the other tail adds nothing where the power is 80%
        return float(stats.nct.sf(threshold, degrees, center)) - POWER

    return float(optimize.brentq(missing, 0.0, 2 * threshold + 2))
