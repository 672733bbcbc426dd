"""Paired statistics by hand, and where they must stay silent."""

import doctest
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from alignlab.experiments.report import statistics as paired_module
from alignlab.experiments.report.statistics import (
    Paired,
    detectable_difference,
    holm,
    holm_levels,
    p_value,
    paired_statistics,
)

FIVE = [0.10, 0.12, 0.09, 0.15, 0.11]
TEN = [0.10, 0.12, 0.09, 0.15, 0.11, -0.02, 0.30, 0.08, 0.01, 0.13]


def one(values: list[float], scale: float = 1.0) -> Paired:
    return paired_statistics({"ra": values}, {"ra": scale})["ra"]


def test_examples_in_the_docs() -> None:
    assert doctest.testmod(paired_module).failed == 0


def test_few_pairs_use_student_t() -> None:
    found, reference = one(FIVE), stats.ttest_1samp(FIVE, 0.0)
    limits = reference.confidence_interval(0.95)
    assert (found.num_pairs, found.method) == (5, "t")
    assert found.mean == pytest.approx(0.114) and found.std == pytest.approx(statistics.stdev(FIVE))
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high))
    assert found.confidence == 0.95
    assert found.p_value == pytest.approx(reference.pvalue)
    assert found.sign_flip_p == 2 / 2**5, "the smallest that five seeds can give"
    assert found.is_claimed


def test_many_pairs_use_bca_and_sign_flips() -> None:
    found = one(TEN)
    assert found.method == "bootstrap" and found.low is not None and found.high is not None
    # every sign pattern, counted by hand
    patterns = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    sums = np.abs(np.array(TEN) @ patterns)
    assert found.p_value == pytest.approx(np.mean(sums >= sum(TEN) - 1e-9))
    plain = stats.bootstrap((np.array(TEN),), np.mean, method="BCa", rng=0).confidence_interval
    assert found.low < plain.low and found.high > plain.high, "widened for ten seeds"
    scipys = stats.permutation_test(
        (np.array(TEN),), np.mean, permutation_type="samples", n_resamples=9999
    )
    assert found.p_value == pytest.approx(scipys.pvalue)
    t = stats.ttest_1samp(TEN, 0.0).confidence_interval()
    assert found.high - found.low == pytest.approx(t.high - t.low, rel=0.15)
    assert found.high - found.mean > found.mean - found.low, "follows the long right tail"
    assert one(TEN) == found, "the same numbers every time"


@pytest.mark.parametrize("num_pairs", [10, 13, 14, 20])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_a_sign_flip_interval_ends_where_the_test_rejects(num_pairs: int, level: float) -> None:
    rng = np.random.default_rng(num_pairs)
    values_RN = rng.gamma(2.0, 1.0, (5, num_pairs))
    low_R, high_R = paired_module._not_rejected(values_RN, level)
    for ends_R, outwards in ((low_R, -1e-9), (high_R, 1e-9)):
        assert (p_value(values_RN - ends_R[:, None], "bootstrap") > level).all()
        assert (p_value(values_RN - ends_R[:, None] - outwards, "bootstrap") <= level).all()


def test_very_many_variants_keep_a_test_that_can_pass() -> None:
    names = [str(index) for index in range(30)]
    many = paired_statistics(dict.fromkeys(names, TEN), dict.fromkeys(names, 1.0))
    assert many["0"].method == "t"


def test_equal_numbers_claim_nothing() -> None:
    same = one([0.0] * 5)
    assert same.is_equal and not same.is_claimed
    assert (same.low, same.high, same.p_value, same.sign_flip_p) == (0.0, 0.0, 1.0, 1.0)
    assert (same.effect_size, same.detectable) == (None, None)


def test_equal_differences_have_no_interval_and_claim_nothing() -> None:
    for pairs in (3, 8):
        found = one([0.25] * pairs)
        assert (found.mean, found.std, found.low, found.high) == (0.25, 0.0, None, None)
        assert found.p_value == 2 / 2**pairs and not found.is_claimed and not found.is_equal


def test_rounding_is_no_difference() -> None:
    noise = 0.1 + 0.2 - 0.3
    assert noise != 0.0
    assert one([noise, -noise, noise], 0.3).is_equal
    # the spread, too: three times the same difference but for its last bits
    assert one([0.1 - 0.3, 0.2 - 0.4, 0.3 - 0.5], 0.5).std == 0.0
    assert not one([1e-9, 2e-9, 1e-9], 0.3).is_equal
    assert math.isinf(paired_module.without_rounding(math.inf, math.inf))


def test_one_and_two_pairs_get_no_verdict() -> None:
    assert one([0.5]) == Paired(1, 0.5, None)
    two = one([0.5, 0.5001])
    assert two == Paired(2, two.mean, two.std) and not two.is_claimed
    assert two.mean == pytest.approx(0.50005) and two.std is not None and two.std > 0.0


def test_holm_counts_only_variants_with_a_test() -> None:
    differences = {"a": FIVE, "b": FIVE[:4], "wild": [math.nan, 1.0], "lost": [], "short": [1.0]}
    found = paired_statistics(differences, dict.fromkeys(differences, 1.0))
    assert set(found) == {"a", "b", "short"}
    (a, b) = found["a"], found["b"]
    assert a.p_value is not None and b.p_value is not None and found["short"].holm_p is None
    assert [a.holm_p, b.holm_p] == pytest.approx(holm([a.p_value, b.p_value]))
    assert a.detectable == pytest.approx(detectable_difference(statistics.stdev(FIVE), 5, 2))


def test_holm_by_hand() -> None:
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([0.6, 0.6]) == [1.0, 1.0]


def test_each_p_value_has_the_level_at_which_holm_decides() -> None:
    assert holm_levels([0.2]) == [0.05]
    levels = holm_levels([0.012, 0.011, 0.5, 0.001, 0.04])
    assert levels == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 2, 0.05 / 5, 0.05 / 2])
    assert holm_levels([0.02, 0.03]) == [0.025, 0.05], "the second step follows the first"
    assert holm_levels([0.026, 0.03]) == [0.025, 0.025], "and not a failed one"


@pytest.mark.parametrize(("pairs", "factor"), [(3, 0.5642), (10, 0.9139), (100, 0.9924)])
def test_effect_size_is_hedges_g(pairs: int, factor: float) -> None:
    values = [1.0 + math.sin(index) for index in range(pairs)]
    d = statistics.fmean(values) / statistics.stdev(values)
    assert one(values).effect_size == pytest.approx(d * factor, rel=1e-3)


def test_detectable_difference_is_that_of_the_t_test() -> None:
    # G*Power, one sample, two-sided 5%, power 0.8: d = 0.9964 for ten, 1.6820 for five
    assert detectable_difference(1.0, 10) == pytest.approx(0.9960, abs=1e-3)
    assert detectable_difference(2.0, 5) == pytest.approx(2 * 1.6820, abs=2e-3)
    assert detectable_difference(1.0, 5, 5) > detectable_difference(1.0, 5)


def test_sign_flips_are_exact_for_few() -> None:
    assert p_value(np.array([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0]]), "bootstrap").tolist() == [
        0.25,
        0.75,
    ]
