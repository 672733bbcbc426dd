"""Student's t of numbers of which some are only known to be larger than a bound."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from alignlab.experiments.report.censored import CensoredSample

NUMBERS = st.floats(-2.0, 2.0).map(lambda value: round(value, 6))


def sample_of(known: list[float], bounds: list[float]) -> CensoredSample:
    return CensoredSample(np.asarray(known), np.asarray(bounds))


@st.composite
def samples(draw: st.DrawFn, *, most_bounds: int = 4) -> CensoredSample:
    known = draw(st.lists(NUMBERS, min_size=3, max_size=8))
    assume(np.ptp(known) > 1e-3)
    return sample_of(known, draw(st.lists(NUMBERS, max_size=most_bounds)))


@settings(max_examples=40, deadline=None)
@given(samples(most_bounds=0), st.floats(0.005, 0.2))
def test_where_all_is_known_it_is_student_t(sample: CensoredSample, level: float) -> None:
    known, degrees = sample.known, sample.size - 1
    told = stats.t.interval(1 - level, degrees, known.mean(), stats.sem(known))
    assert sample.interval(level) == pytest.approx(told, rel=1e-6, abs=1e-6)
    assert sample.p_value() == pytest.approx(stats.ttest_1samp(known, 0.0).pvalue, abs=1e-6)
    assert sample.std == pytest.approx(known.std(ddof=1), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(samples())
def test_the_best_fit_is_that_of_scipy(sample: CensoredSample) -> None:
    data = stats.CensoredData(uncensored=sample.known, right=sample.bounds)
    mean, std = stats.norm.fit(data)
    enlarged = std * np.sqrt(sample.size / (sample.size - 1))
    scale = float(np.ptp(sample.known)) + abs(mean)
    assert sample.mean == pytest.approx(mean, abs=1e-3 * scale)
    assert sample.std == pytest.approx(enlarged, abs=1e-3 * scale)


@settings(max_examples=40, deadline=None)
@given(samples(), st.floats(0.005, 0.2))
def test_the_interval_excludes_0_exactly_where_p_is_below_the_level(
    sample: CensoredSample, level: float
) -> None:
    low, high = sample.interval(level)
    assert low < sample.mean < high
    p = sample.p_value()
    assume(abs(p - level) > 1e-6)
    assert (not low <= 0.0 <= high) == (p < level)


@settings(max_examples=20, deadline=None)
@given(samples(), st.floats(-5.0, 5.0), st.floats(0.01, 100.0))
def test_it_moves_and_stretches_with_the_numbers(
    sample: CensoredSample, shift: float, factor: float
) -> None:
    moved = CensoredSample(sample.known * factor + shift, sample.bounds * factor + shift)
    told = [end * factor + shift for end in sample.interval(0.05)]
    assert moved.interval(0.05) == pytest.approx(told, rel=1e-4, abs=1e-4 * factor)


@settings(max_examples=20, deadline=None)
@given(samples(), st.floats(0.01, 2.0))
def test_a_higher_bound_leaves_a_higher_mean(sample: CensoredSample, more: float) -> None:
    assume(len(sample.bounds))
    higher = CensoredSample(sample.known, sample.bounds + more)
    without = CensoredSample(sample.known, np.empty(0))
    everything = np.concatenate([sample.known, sample.bounds])
    assert sample.mean >= everything.mean() - 1e-9
    assert higher.mean >= sample.mean - 1e-9
    assert CensoredSample(sample.known, sample.bounds + 1e3).mean > without.mean


@pytest.mark.parametrize("num_seeds", [5, 10])
def test_intervals_hold_the_truth_where_two_of_five_are_not_known(num_seeds: int) -> None:
    rng, bound, held, shown = np.random.default_rng(0), float(stats.norm.isf(0.4)), 0, 0
    while shown < 300:
        drawn = rng.standard_normal(num_seeds)
        known = drawn[drawn <= bound]
        if len(known) >= 3:
            shown += 1
            sample = CensoredSample(known, np.full(num_seeds - len(known), bound))
            held += abs(sample.t(0.0)) <= stats.t.isf(0.025, num_seeds - 1)
    assert 0.92 <= held / shown <= 0.985  # tests/campaigns/steps_to_target.py counts more of them
