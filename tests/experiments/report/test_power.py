"""How many seeds are needed: the inverse of the smallest difference that so many can find."""

import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from alignlab.errors import UserError
from alignlab.experiments.report.power import SeedsNeeded, print_seeds_needed, seeds_needed
from alignlab.experiments.report.statistics import (
    MIN_PAIRS,
    MOST_PAIRS,
    detectable_difference,
    pairs_needed,
)
from alignlab.experiments.report.summary import SummaryRow, summary_rows
from recipe_comparisons import recipe_comparison

VARIANTS = ("none", "refalign", "repa", "videorepa")


@pytest.mark.parametrize("num_tests", [1, 5])
@pytest.mark.parametrize("num_pairs", [3, 4, 5, 8, 20, 117, 3000])
def test_pairs_needed_is_the_inverse_of_the_detectable_difference(
    num_pairs: int, num_tests: int
) -> None:
    size = detectable_difference(0.3, num_pairs, num_tests)
    assert pairs_needed(0.3, size, num_tests) == num_pairs
    assert pairs_needed(0.3, size * 0.9999, num_tests) == num_pairs + 1
    smaller = num_pairs - 1 if num_pairs > MIN_PAIRS else MIN_PAIRS
    assert pairs_needed(0.3, detectable_difference(0.3, smaller, num_tests), num_tests) == smaller


def test_pairs_needed_has_ends() -> None:
    assert pairs_needed(1e-9, 1.0) == MIN_PAIRS
    assert pairs_needed(1.0, 1e-9) is None
    last = detectable_difference(1.0, MOST_PAIRS)
    assert pairs_needed(1.0, last) == MOST_PAIRS
    assert pairs_needed(1.0, last * 0.9999) is None


def test_so_many_pairs_find_it_in_80_percent() -> None:
    needed = pairs_needed(1.0, 0.7, 2)
    assert needed is not None
    draws = np.random.default_rng(0).normal(0.7, 1.0, (20_000, needed))
    p_values = stats.ttest_1samp(draws, 0.0, axis=-1).pvalue
    assert np.mean(p_values <= 0.05 / 2) == pytest.approx(0.8, abs=0.03)


@pytest.fixture(scope="module")
def rows() -> list[SummaryRow]:
    return summary_rows(recipe_comparison(VARIANTS, (0, 1, 2, 3)))


def test_each_variant_has_its_own_spread_at_the_level_of_the_report(
    rows: list[SummaryRow],
) -> None:
    found = {one.variant: one for one in seeds_needed(rows, "val/flow", 0.002)}
    assert list(found) == ["refalign", "repa", "videorepa"]
    for row in rows:
        if row.metric == "val/flow" and not row.is_baseline:
            assert row.paired is not None and row.paired.std is not None
            one = found[row.variant]
            assert one.detectable == row.paired.detectable
            assert one.needed == pairs_needed(row.paired.std, 0.002, 3)
            assert one.needed is not None and one.low is not None and one.high is not None
            assert one.low <= one.needed <= one.high
            assert (one.seeds, one.more) == (4, max(one.needed - 4, 0))


def test_the_observed_spread_at_what_is_found_now_needs_no_further_seed(
    rows: list[SummaryRow],
) -> None:
    for one in seeds_needed(rows, "val/flow", 1.0):
        assert one.detectable is not None
        (same,) = (
            s for s in seeds_needed(rows, "val/flow", one.detectable) if s.variant == one.variant
        )
        assert (same.needed, same.more) == (4, 0)


def test_of_steps_to_target_it_is_a_share_of_the_steps(rows: list[SummaryRow]) -> None:
    found = seeds_needed(rows, "steps_to_target", 0.1)
    known = [one for one in found if one.std]
    assert known
    for one in known:
        assert one.std is not None
        assert one.needed == pairs_needed(one.std, -math.log(0.9), len(found))


@pytest.mark.parametrize(
    ("metric", "difference", "message"),
    [
        ("val/flwo", 0.1, r"--metric: unknown metric 'val/flwo', did you mean 'val/flow'\?"),
        ("val/flow", 0.0, r"--power: expected a difference above 0, got 0"),
        ("val/flow", math.nan, r"--power: expected a difference above 0, got nan"),
        ("steps_to_target", 1.5, r"--power: .* share of steps that is saved"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    rows: list[SummaryRow], metric: str, difference: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        seeds_needed(rows, metric, difference)


def test_without_a_spread_nothing_is_said() -> None:
    rows = summary_rows(recipe_comparison(VARIANTS, (0,)))
    found = seeds_needed(rows, "val/flow", 0.01)
    assert {(one.needed, one.unknown) for one in found} == {(None, "no spread is known")}
    equal = [row for row in rows if row.metric == "params/extra"]
    assert seeds_needed(equal, "params/extra", 1.0)[0].unknown == "no spread is known"
    rows = summary_rows(recipe_comparison(VARIANTS, (0, 1, 2)))
    assert (
        seeds_needed(rows, "params/extra", 1.0)[0].unknown == "the same difference with every seed"
    )


def test_the_table_names_the_level_and_what_is_missing(rows: list[SummaryRow]) -> None:
    console = Console(record=True, width=200)
    found = [*seeds_needed(rows, "val/flow", 0.002), SeedsNeeded("odd", 2, unknown="diverged")]
    print_seeds_needed(rows, "val/flow", 0.002, found, console)
    text = console.export_text()
    assert "0.002000 in val/flow with 80% power, at the report's level (5% / 3 variants)" in text
    refalign = next(line for line in text.splitlines() if "refalign" in line)
    assert refalign.split()[-1] == str(found[0].more)
    assert next(line for line in text.splitlines() if "odd" in line).split()[-1] == "diverged"
