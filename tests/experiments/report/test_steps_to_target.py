"""Steps to target: where curves cross it, seeds that never do, and what a report says of it."""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from alignlab.experiments.compare.result import Comparison, Curve, RunResult
from alignlab.experiments.report.censored import CensoredSample
from alignlab.experiments.report.charts import level_charts, step_charts
from alignlab.experiments.report.forest import forest_charts
from alignlab.experiments.report.latex import table_tex
from alignlab.experiments.report.statistics import ALPHA
from alignlab.experiments.report.steps_to_target import (
    crossing,
    steps_footnotes,
    steps_to_target,
)
from alignlab.experiments.report.summary import SummaryRow, footnotes, summary_rows
from alignlab.experiments.report.text import markdown, table_csv
from alignlab.experiments.report.verdict import verdict
from alignlab.experiments.report.write import write_report
from drawn_charts import drawn_lines, points
from made_comparisons import make_comparison
from noisy_curves import STEPS, Noise, logs_of_curves
from run_contents import read_table

NAN, INF = math.nan, math.inf
WIGGLE = (0.0, 0.01, -0.02, 0.015, -0.005, 0.007, -0.012, 0.003)


@pytest.mark.parametrize(
    ("curve", "target", "step"),
    [
        (((10, 0.5), (20, 0.4)), 0.45, math.sqrt(200)),  # linear in the logarithm of the step
        (((10, 0.5), (20, 0.4)), 0.4, 20.0),  # ends at the target
        (((10, 0.5), (20, 0.4)), 0.39, None),
        (((10, 0.5), (20, 0.3), (30, 0.5)), 0.4, None),  # was there, and ends above it
        # first and last
        (((10, 0.5), (20, 0.3), (30, 0.5), (40, 0.3)), 0.4, (math.sqrt(200) + math.sqrt(1200)) / 2),
        (((10, 0.3), (20, 0.5), (30, 0.4)), 0.4, 30.0),  # a curve that ends at it, whatever before
        (((10, 0.3), (20, 0.2)), 0.4, 10.0),  # at its first evaluation
        (((0, 0.5), (20, 0.3)), 0.4, 10.0),  # step 0 has no logarithm
        (((0, 0.3), (20, 0.2)), 0.4, 1.0),  # no training takes less than a step
        (((10, NAN), (20, 0.3), (30, 0.3)), 0.4, 20.0),  # no line from a number that is none
        (((10, INF), (20, 0.3), (30, 0.3)), 0.4, 20.0),
        (((10, 0.3), (20, NAN)), 0.4, None),
        (((10, 1.7e308), (20, -1.7e308)), 0.0, math.sqrt(200)),
        (((10, 5e-324), (20, -5e-324)), 0.0, math.sqrt(200)),
    ],
)
def test_where_a_curve_reaches_a_target(curve: Curve, target: float, step: float | None) -> None:
    assert crossing(curve, target) == (step if step is None else pytest.approx(step))


CURVES = st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=12).map(
    lambda values: tuple((100 * (place + 1), value) for place, value in enumerate(values))
)


@settings(max_examples=60, deadline=None)
@given(CURVES, st.floats(-1.0, 1.0), st.floats(0.0, 0.5))
def test_a_lower_target_is_never_reached_sooner(curve: Curve, target: float, less: float) -> None:
    step, later = crossing(curve, target), crossing(curve, target - less)
    assert (step is None) == (curve[-1][1] > target)
    if step is not None:
        assert curve[0][0] <= step <= curve[-1][0]
    if later is not None:
        assert step is not None
        assert later >= step - 1e-6 or curve[-1][1] == target


def run_of(variant: str, seed: int, curve: Curve, *, diverged: bool = False) -> RunResult:
    measured = {"val/flow": curve, "val/flow/t3": curve}
    last = {name: points[-1][1] for name, points in measured.items()}
    return RunResult(
        variant, seed, curve[-1][0], "", last, {}, measured=measured, diverged=diverged
    )


def falling(ratio: float, seed: int, *, steps: int = 2000, every: int = 50) -> Curve:
    """A curve that takes `ratio` of the baseline's steps to any loss."""
    places = range(every, steps + 1, every)
    return tuple((step, 0.3 + 0.01 * seed + (step / ratio / 500) ** -0.8) for step in places)


def made(ratios: Mapping[str, Sequence[float]], **fields: Any) -> Comparison:
    """A comparison of variants that take these ratios, one per seed."""
    return make_comparison(
        (
            run_of(variant, seed, falling(ratio, seed))
            for variant, by_seed in ratios.items()
            for seed, ratio in enumerate(by_seed)
        ),
        **fields,
    )


@pytest.mark.parametrize("ratio", [0.7, 0.85])
def test_four_evaluations_put_a_steady_curve_where_it_is(ratio: float) -> None:
    runs = [run_of(name, 0, falling(r, 0, every=500)) for name, r in (("none", 1.0), ("b", ratio))]
    comparison = make_comparison(runs)
    found = steps_to_target(comparison)["b"].ratios[0]
    assert found == pytest.approx(ratio, rel=0.01)  # a line over the step itself: 2% too late


def around(ratio: float, num_seeds: int) -> list[float]:
    return [ratio * math.exp(WIGGLE[seed]) for seed in range(num_seeds)]


def rows_of(comparison: Comparison) -> dict[str, SummaryRow]:
    return {r.variant: r for r in summary_rows(comparison) if r.metric == "steps_to_target"}


def test_the_planted_ratio_is_found_and_claimed() -> None:
    found = made({"none": [1.0] * 5, "fast": around(0.6, 5)})
    row = rows_of(found)["fast"]
    assert row.target is not None and row.target.interval is not None
    assert list(row.values.values()) == pytest.approx(around(0.6, 5), rel=5e-3)
    low, high = row.target.interval
    assert low < 0.6 < high < 0.63 and (row.change, row.agreement) == ("better", "5/5")
    logs = [math.log(ratio) for ratio in row.values.values()]
    assert row.target.mean == pytest.approx(math.exp(sum(logs) / 5))
    assert rows_of(found)["none"].value_text == "1.00"
    words = verdict(found, summary_rows(found)).variants["fast"]
    assert "gets to none's last validation flow loss in 60.0% [59.0%, 61.0%] of its steps" in words


def test_the_table_says_what_could_have_been_seen_where_all_seeds_reach_it() -> None:
    """By a t-test of the log ratios, at the level that one of the three must pass."""
    ratios = {"fast": around(0.6, 5), "mixed": [0.9, 0.95, 0.97, 1.2, 1.3], "same": [1.0] * 5}
    found = made({"none": [1.0] * 5, **ratios, "late": around(0.95, 5)})
    rows = rows_of(found)
    lines = {
        line["variant"]: line["detectable"]
        for line in csv.DictReader(table_csv(found, summary_rows(found)).splitlines())
        if line["metric"] == "steps_to_target"
    }
    assert [name for name, value in lines.items() if value] == ["fast", "late"]
    for name in ("fast", "late"):
        logs = np.log(list(rows[name].values.values()))
        size = float(lines[name]) / logs.std(ddof=1) * math.sqrt(5)
        critical = stats.t.isf(ALPHA / 3 / 2, 4)
        power = stats.nct.sf(critical, 4, size) + stats.nct.cdf(-critical, 4, size)
        assert power == pytest.approx(0.8, abs=1e-3)


def test_a_seed_that_never_reaches_it_is_kept_and_told() -> None:
    # 2,000 of the slow seeds' steps are not enough
    found = made({"none": [1.0] * 5, "mixed": [0.9, 0.95, 0.97, 1.2, 1.3]})
    row = rows_of(found)["mixed"]
    steps = row.target
    assert steps is not None and steps.never == (3, 4) and steps.ratios[3] == 1.0
    known = [steps.ratios[seed] for seed in (0, 1, 2)]
    assert steps.mean is not None and steps.mean > math.exp(sum(map(math.log, known)) / 5)
    assert steps.interval is not None and steps.interval[0] < 1.0 < steps.interval[1]
    assert row.paired is not None and row.paired.method == "censored t"
    assert row.value_text.endswith("(never in 2/5)") and (row.change, row.agreement) == ("", "3/5")
    words = verdict(found, summary_rows(found)).variants["mixed"]
    assert "2 of 5 seeds never reached it)" in words
    (note,) = steps_footnotes(found, steps_to_target(found))
    assert "mixed with 2 of 5 seeds (3, 4)" in note


def test_where_too_few_reach_it_there_is_a_bound_and_no_claim() -> None:
    found = made({"none": [1.0] * 5, "slow": [0.9, 0.95, 1.4, 1.5, 1.6], "never": [2.0] * 5})
    for variant, shown in {"slow": "> 0.97", "never": "> 1.00"}.items():
        row = rows_of(found)[variant]
        assert row.target is not None and row.target.interval is None
        assert row.value_text.startswith(shown) and (row.diff_text, row.change) == ("—", "")
        assert row.p_text == ""
    words = verdict(found, summary_rows(found)).variants["never"]
    assert "steps to target (5 of 5 seeds never reached it: more than 1.00 in the mean)." in words


def test_a_copy_of_the_baseline_takes_exactly_its_steps() -> None:
    rising = tuple((step, 0.4 + abs(step - 400) / 1000) for step in range(100, 1001, 100))
    for curve in (falling(1.0, 0), rising):
        found = make_comparison(
            run_of(v, seed, curve) for v in ("none", "copy") for seed in (0, 1, 2)
        )
        row = rows_of(found)["copy"]
        assert row.values == {0: 1.0, 1: 1.0, 2: 1.0} and row.change == ""
        assert (
            "exactly the baseline's validation flow loss and steps to target"
            in (verdict(found, summary_rows(found)).variants["copy"])
        )
    notes = footnotes(found, summary_rows(found))
    assert any(
        "none itself was as low as at its end long before: after 10% (seed 0)" in n for n in notes
    )


def test_few_evaluations_are_told() -> None:
    for every, is_told in ((250, False), (500, True)):
        runs = (
            run_of(variant, seed, falling(ratio, seed, every=every))
            for variant, ratio in {"none": 1.0, "fast": 0.6}.items()
            for seed in range(3)
        )
        found = make_comparison(runs)
        notes = footnotes(found, summary_rows(found))
        assert any("There are 4 evaluations" in note for note in notes) == is_told


def test_a_variant_with_fewer_steps_is_known_up_to_those() -> None:
    runs = [run_of("none", seed, falling(1.0, seed)) for seed in range(3)]
    runs += [run_of("short", seed, falling(1.0, seed, steps=1500)) for seed in range(3)]
    steps = steps_to_target(make_comparison(runs))["short"]
    assert steps.ratios == {0: 0.75, 1: 0.75, 2: 0.75} and steps.never == (0, 1, 2)
    assert (steps.text, steps.num_sooner) == ("> 0.75", 0)


def test_the_correction_is_over_the_variants() -> None:
    ratios = {"none": [1.0] * 5, "a": around(0.97, 5), "b": around(0.7, 5), "c": [2.0] * 5}
    rows = rows_of(made(ratios))
    alone = rows_of(made({"none": ratios["none"], "a": ratios["a"]}))["a"].paired
    a, b = rows["a"].paired, rows["b"].paired
    assert a is not None and b is not None and alone is not None and alone.p_value is not None
    assert a.p_value == alone.p_value == a.holm_p, "tested last, at 5%"
    assert b.p_value is not None and b.holm_p == pytest.approx(2 * b.p_value)
    assert (b.confidence, a.confidence, alone.confidence) == (0.975, 0.95, 0.95)


def test_of_a_variant_that_diverged_nothing_is_claimed() -> None:
    runs = made({"none": [1.0] * 5, "fast": around(0.6, 5)}).results
    runs = tuple(
        dataclasses.replace(run, diverged=run.variant == "fast" and run.seed == 2) for run in runs
    )
    row = rows_of(make_comparison(runs))["fast"]
    assert row.change == "" and "†" in row.value_text


def test_seeds_without_curves_are_left_out_and_named() -> None:
    runs = list(made({"none": [1.0] * 5, "fast": around(0.6, 5)}).results)
    runs[0] = dataclasses.replace(runs[0], measured={})  # of the baseline, seed 0
    runs[9] = dataclasses.replace(runs[9], measured={})
    row = rows_of(make_comparison(runs))["fast"]
    assert list(row.values) == [1, 2, 3] and row.flag == "3 of 5 seeds"
    assert row.change == "better"


@pytest.mark.parametrize("num_seeds", [5, 10])
def test_a_baseline_against_its_copy_under_other_noise_is_rarely_claimed(num_seeds: int) -> None:
    # a wiggle larger than what the loss falls by between two evaluations
    rng, noise = np.random.default_rng(0), Noise(0.001, 0.003, 0.003, 100)
    claimed, sooner = 0, 0
    for _ in range(300):
        known, bounds = logs_of_curves(rng, num_seeds, noise, 1.0)
        sooner += sum(x < 0.0 for x in known)
        if len(known) >= 3:
            sample = CensoredSample(np.asarray(known), np.asarray(bounds))
            claimed += sample.p_value() <= ALPHA
    assert claimed <= 0.06 * 300
    assert sooner / (300 * num_seeds) == pytest.approx(0.5, abs=0.05)
    assert STEPS == 2000


def test_the_report_shows_it_in_every_form(tmp_path: Path) -> None:
    ratios = {"none": [1.0] * 5, "fast": around(0.6, 5), "mixed": [0.9, 0.95, 0.97, 1.2, 1.3]}
    found = made(ratios)
    page = write_report(found, tmp_path).read_text()
    rows = summary_rows(found)
    fast, mixed = (rows_of(found)[variant] for variant in ("fast", "mixed"))
    assert f'<span class="mean">{fast.text[0]}</span>' in page and fast.diff_text in page
    assert ">never in 2/5</span>" in page
    assert f"| steps to target ↓ | 1.00 | **{fast.text[0]}** | {mixed.value_text} |" in (
        markdown(found, rows)
    )
    tex = table_tex(found, rows)
    assert r"steps to target $\downarrow$" in tex and "(never in 2/5)" in tex
    assert "Steps to target: geometric mean of the steps to the last validation flow loss" in tex
    lines = {
        line["variant"]: line
        for line in read_table(tmp_path / "table.csv")
        if line["metric"] == "steps_to_target"
    }
    never = {variant: line["never_reached_seeds"] for variant, line in lines.items()}
    assert never == {"none": "", "fast": "", "mixed": "3 4"}
    assert float(lines["fast"]["ratio"]) == fast.mean
    assert float(lines["mixed"]["seed_3"]) == 1.0
    path = tmp_path / "comparison.json"
    found.save(path)
    assert rows_of(Comparison.load(path)) == rows_of(found)


def test_the_table_gives_no_bound_as_a_mean() -> None:
    # "slow" reaches it with two seeds of five: too few for an interval
    slow = [0.9, 0.95, 1.4, 1.5, 1.6]
    found = made({"none": [1.0] * 5, "fast": around(0.6, 5), "slow": slow, "never": [2.0] * 5})
    lines = {
        (line["metric"], line["variant"]): line
        for line in csv.DictReader(table_csv(found, summary_rows(found)).splitlines())
    }
    for variant, seeds in {"slow": "2 3 4", "never": "0 1 2 3 4"}.items():
        line = lines["steps_to_target", variant]
        assert line["never_reached_seeds"] == seeds and line["change"] == ""
        for column in ("mean", "std", "diff_mean", "diff_std", "diff_low", "diff_high", "ratio"):
            assert line[column] == "", (variant, column)
        assert line["seed_4"] == "1.0" and line["num_pairs"] == "5"
    fast = lines["steps_to_target", "fast"]
    assert float(fast["diff_mean"]) == pytest.approx(math.log(float(fast["mean"])))
    scales = {key: line["diff_scale"] for key, line in lines.items()}
    assert scales["steps_to_target", "fast"] == scales["steps_to_target", "never"] == "log ratio"
    assert scales["val/flow", "fast"] == "difference" and scales["val/flow", "none"] == ""


def test_the_table_of_one_seed_that_never_reaches_it_has_no_mean() -> None:
    found = made({"none": [1.0], "never": [2.0], "late": [0.9]})
    lines = {
        line["variant"]: line
        for line in csv.DictReader(table_csv(found, summary_rows(found)).splitlines())
        if line["metric"] == "steps_to_target"
    }
    columns = ("mean", "diff_mean", "never_reached_seeds", "seed_0")
    assert [lines["never"][column] for column in columns] == ["", "", "0", "1.0"]
    assert float(lines["late"]["mean"]) == pytest.approx(0.9, rel=5e-3)


def test_the_charts_show_the_target_and_who_never_reached_it() -> None:
    found = made({"none": [1.0] * 5, "mixed": [0.9, 0.95, 0.97, 1.2, 1.3]})
    flow = step_charts(found)[0]
    target = sum(falling(1.0, seed)[-1][1] for seed in range(5)) / 5
    across = [line for line in flow.figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [points(line)[1] for line in across] == [pytest.approx([target, target])]
    rows = summary_rows(found)
    (chart,) = [c for c in forest_charts(found, rows) if c.title.startswith("steps to target")]
    marks = drawn_lines(chart, found.variants)["mixed"]
    seeds = [line for line in marks if line.get_alpha() is not None]
    assert [line.get_marker() for line in seeds] == ["."] * 3 + [">"] * 2
    assert [points(line)[0] for line in seeds[3:]] == [[0.0], [0.0]]
    assert "never reached" in chart.caption
    never = made({"none": [1.0] * 5, "never": [2.0] * 5})
    shown = forest_charts(never, summary_rows(never))
    assert [chart.title for chart in shown] == ["validation flow loss ↓"], "bounds are no dots"
    assert [c.title for c in level_charts(found)] == ["validation flow loss, t 0.3 to 0.4"]


def test_without_curves_there_is_nothing_but_how_to_get_it() -> None:
    runs = [
        dataclasses.replace(run, measured={})
        for run in made({"none": [1.0] * 3, "fast": around(0.6, 3)}).results
    ]
    old = make_comparison(runs, recipe="name: old\neval:\n  clips: 2\n")
    off = make_comparison(runs, recipe="eval:\n  clips: 2\n  every: null\n  blocks: null\n")
    for found in (old, off):
        assert rows_of(found) == {} and level_charts(found) == []
        words = verdict(found, summary_rows(found)).sentences
        assert not any("steps to target" in sentence for sentence in words)
    assert "Steps to target" not in markdown(old, summary_rows(old))
    notes = footnotes(off, summary_rows(off))
    assert [n for n in notes if "Steps to target" in n and "eval.every=N" in n]
