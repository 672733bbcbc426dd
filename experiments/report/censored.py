"""Student's t for numbers of which some are known only to be larger than a bound (right-censored).

The numbers are normal; a number that is known adds its density to the likelihood, one that is
only known to be above `bound` the chance of that (Tobin 1958). With LR(m) = 2 (log L of the best
fit minus log L of the best fit whose mean is m) and n numbers, known or not,

    t(m)^2 = (n - 1) (exp(LR(m) / n) - 1)

is Student's t of the mean m, exactly so where all numbers are known. It is taken for one with n -
1 degrees of freedom in any case; `tests/campaigns/steps_to_target.py` counts how often that is
wrong.

With the precision 1 / std of the numbers less m as its argument, the log-likelihood is concave
(Olsen 1978).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from alignlab.experiments.report.statistics import Array

_LOG_ROOT_2_PI = math.log(2.0 * math.pi) / 2.0


@dataclass(frozen=True)
class CensoredSample:
    """Numbers of one sample; those known are not all equal.

    Args:
        known: the numbers that are known, at least two, in any order.
        bounds: of each of the others, what it is known to be larger than.
    """

    known: Array
    bounds: Array

    @property
    def size(self) -> int:
        """How many numbers there are, known or not."""
        return len(self.known) + len(self.bounds)

    @property
    def mean(self) -> float:
        """The most likely mean, at least that of the numbers with the bounds in their place."""
        lowest = float(np.concatenate([self.known, self.bounds]).mean())
        if not len(self.bounds):
            return lowest
        return _root(self._slope, lowest, self._width)

    @property
    def std(self) -> float:
        """The most likely standard deviation, enlarged as the sample's is (n - 1)."""
        return math.sqrt(self.size / (self.size - 1)) / self._profile(self.mean)[1]

    def t(self, mean: float) -> float:
        """Student's t of a mean; positive where the most likely one is larger."""
        best = self.mean
        ratio = 2.0 * (self._profile(best)[0] - self._profile(mean)[0])
        size = math.sqrt((self.size - 1) * math.expm1(max(ratio, 0.0) / self.size))
        return math.copysign(size, best - mean)

    def p_value(self) -> float:
        """Two-sided p-value of a mean of 0."""
        return float(2.0 * stats.t.sf(abs(self.t(0.0)), self.size - 1))

    def interval(self, level: float) -> tuple[float, float]:
        """Interval of the mean, which excludes 0 exactly where `p_value` is below `level`."""
        critical = float(stats.t.isf(level / 2.0, self.size - 1))
        loss = self.size / 2.0 * math.log1p(critical**2 / (self.size - 1))
        best = self.mean
        least = self._profile(best)[0] - loss
        low, high = (
            _root(lambda mean: self._profile(mean)[0] - least, best, sign * self._width)
            for sign in (-1.0, 1.0)
        )
        return low, high

    @property
    def _width(self) -> float:
        return float(np.ptp(self.known))

    def _slope(self, mean: float) -> float:
        """Of the profile of the log-likelihood over the mean, with the sign of its derivative."""
        precision = self._profile(mean)[1]
        known_K, bounds_B = precision * (self.known - mean), precision * (self.bounds - mean)
        return float(known_K.sum() + _hazard(bounds_B).sum())

    def _profile(self, mean: float) -> tuple[float, float]:
        """Log-likelihood of the best fit with this mean, and its precision."""
        known_K, bounds_B = self.known - mean, self.bounds - mean

        def slope(log_precision: float) -> float:
            precision = math.exp(log_precision)
            lost = precision * float((known_K**2).sum())
            lost += float(_hazard(precision * bounds_B) @ bounds_B)
            return len(known_K) - precision * lost

        start = -math.log(math.sqrt(float((known_K**2).mean())))
        low, high = start, start
        while slope(low) < 0.0:
            low -= 1.0
        while slope(high) > 0.0:
            high += 1.0
        log_precision = low if low == high else optimize.brentq(slope, low, high, xtol=1e-12)
        precision = math.exp(log_precision)
        value = len(known_K) * (log_precision - _LOG_ROOT_2_PI)
        value -= precision**2 * float((known_K**2).sum()) / 2.0
        value += float(special.log_ndtr(-precision * bounds_B).sum())
        return value, precision


def _root(function: Callable[[float], float], start: float, step: float) -> float:
    """Where a function that is positive at `start` is 0, looked for in the direction of `step`."""
    near, far = start, start + step
    while function(far) > 0.0:
        near, step = far, 2.0 * step
        far += step
    return float(optimize.brentq(function, near, far, xtol=1e-13, rtol=1e-12))


def _hazard(z: Array) -> Array:
    """Density of the normal distribution over the chance of more."""
    return np.asarray(np.exp(-(z**2) / 2.0 - _LOG_ROOT_2_PI - special.log_ndtr(-z)))
