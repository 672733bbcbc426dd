"""The first screen of a report: the matrix, short sentences, the forest plot, quality and cost."""

import dataclasses
import io
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from alignlab.experiments import load_comparison
from alignlab.experiments.charts.chart import placed_readouts
from alignlab.experiments.charts.look import PAPER
from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.report.cost_charts import cost_charts, pareto_front
from alignlab.experiments.report.forest import forest_charts, forest_figure
from alignlab.experiments.report.matrix import matrix_of
from alignlab.experiments.report.summary import summary_rows
from alignlab.experiments.report.text import markdown, print_summary
from alignlab.experiments.report.verdict import verdict
from drawn_charts import drawn_lines, points
from made_comparisons import make_comparison

SEEDS = range(5)
# By how much each variant moves the loss (less is better) and identity (more is better).
MOVED = {"none": (0.0, 0.0), "good": (-0.1, 0.2), "bad": (0.1, 0.0), "mixed": (-0.1, -0.2)}


def run_of(variant: str, seed: int, seconds: float = 1.0) -> RunResult:
    rng = np.random.default_rng([seed, len(variant)])
    shared = np.random.default_rng(seed).normal(size=2)
    flow, identity = MOVED[variant]
    noise = rng.normal(size=3) * 0.01 * (variant != "none")
    metrics = {
        "val/flow": 1.0 + 0.1 * shared[0] + flow + noise[0],
        "gen/identity_proxy": 0.5 + 0.1 * shared[1] + identity + noise[1],
        "time/step": seconds + 0.01 * noise[2],
    }
    return RunResult(variant, seed, 10, "", {name: float(v) for name, v in metrics.items()}, {})


@pytest.fixture(scope="module")
def made() -> Comparison:
    seconds = {"none": 1.0, "good": 1.2, "bad": 1.0, "mixed": 1.1}
    return make_comparison(run_of(v, s, seconds[v]) for v in MOVED for s in SEEDS)


def kinds(found: Comparison) -> dict[str, list[str]]:
    matrix = matrix_of(found, summary_rows(found))
    assert matrix is not None
    return {variant: [cell.kind for cell in cells] for variant, cells in matrix.cells.items()}


def test_the_matrix_says_what_the_rows_claim(made: Comparison) -> None:
    assert kinds(made) == {
        "good": ["better", "better", "worse"],
        "bad": ["worse", "not told apart", "not told apart"],
        "mixed": ["better", "worse", "worse"],
    }
    matrix = matrix_of(made, summary_rows(made))
    assert matrix is not None
    assert [row.metric for row in matrix.metrics] == [
        "val/flow",
        "gen/identity_proxy",
        "time/step",
    ]
    assert [matrix.count("mixed", kind) for kind in ("better", "worse")] == [1, 1], "costs aside"
    signs = {cell.sign for cells in matrix.cells.values() for cell in cells}
    assert len(signs) == 3, "also without colour"


def test_what_was_not_measured_has_no_verdict_in_the_matrix(made: Comparison) -> None:
    def without(run: RunResult) -> RunResult:
        if run.variant != "good":
            return run
        metrics = {k: v for k, v in run.metrics.items() if k != "gen/identity_proxy"}
        return dataclasses.replace(run, metrics=metrics)

    few = dataclasses.replace(made, results=tuple(map(without, made.results)))
    assert kinds(few)["good"] == ["better", "no verdict", "worse"]
    lost = [
        dataclasses.replace(run, diverged=run.variant == "good" and run.seed == 0)
        for run in made.results
    ]
    diverged = dataclasses.replace(made, results=tuple(lost))
    assert kinds(diverged)["good"] == ["no verdict"] * 3, "of a run that diverged"
    two = dataclasses.replace(
        made, seeds=(0, 1), results=tuple(run for run in made.results if run.seed < 2)
    )
    assert matrix_of(two, summary_rows(two)) is None


def test_a_short_sentence_has_the_claims_and_counts_the_rest(made: Comparison) -> None:
    found = verdict(made, summary_rows(made))
    assert list(found.short) == ["good", "bad", "mixed"]
    for variant, text in found.short.items():
        assert "could have seen" not in text and text.startswith(f"{variant}: ")
    assert "lowers validation flow loss" in found.short["good"] and "20" in found.short["good"]
    assert found.short["bad"].endswith("; 2 more metrics not told apart from the baseline.")
    assert "(better, 9.7%)" in found.short["good"], "of the baseline's loss"
    bare = {k: v for k, v in made.results[5].metrics.items() if k == "time/step"}
    lost = tuple(
        dataclasses.replace(run, metrics=bare) if run.variant == "bad" else run
        for run in made.results
    )
    few = dataclasses.replace(made, results=lost)
    words = verdict(few, summary_rows(few)).short["bad"]
    assert "step time" in words and words.endswith("2 more metrics without a verdict.")


def test_terminal_and_markdown_begin_with_the_short_sentences(made: Comparison) -> None:
    found, terminal = verdict(made, summary_rows(made)), io.StringIO()
    print_summary(made, Console(width=400, file=terminal))
    for text in found.short.values():
        assert text in terminal.getvalue()
    assert "could have seen" not in terminal.getvalue()
    first, full = markdown(made, summary_rows(made)).split("## The verdict in full")
    assert "could have seen" not in first and full.count("could have seen") >= 2
    assert "- bad: raises validation flow loss" in first


def test_the_forest_fills_what_is_claimed_and_draws_every_seed(made: Comparison) -> None:
    rows = summary_rows(made)
    charts = forest_charts(made, rows)
    assert [chart.title for chart in charts] == [
        "validation flow loss ↓",
        "subject identity (proxy) ↑",
    ]
    by_key = {(row.metric, row.variant): row for row in rows}
    for chart, metric in zip(charts, ("val/flow", "gen/identity_proxy"), strict=True):
        for variant, lines in drawn_lines(chart, made.variants).items():
            row = by_key[metric, variant]
            assert row.paired is not None
            *dots, interval, mark = lines
            assert sorted(points(dot)[0][0] for dot in dots) == sorted(row.differences.values())
            assert points(interval)[0] == [row.paired.low, row.paired.high]
            assert points(mark)[0] == [row.paired.mean]
            assert (mark.get_markerfacecolor() != PAPER) == bool(row.change)
        assert chart.svg
        found: Any = placed_readouts(chart)
        heights = [place[1] for place in found]
        assert heights == sorted(heights) and 0.0 < heights[0] < heights[-1] < 1.0, "top to bottom"
    whole = forest_figure(made, rows)
    assert whole is not None and len(whole.axes) == 2


def test_two_seeds_are_no_verdict_in_the_forest_either(made: Comparison) -> None:
    two = dataclasses.replace(
        made, seeds=(0, 1), results=tuple(run for run in made.results if run.seed < 2)
    )
    for chart in forest_charts(two, summary_rows(two)):
        assert {readout.rows[-1][1] for readout in chart.readouts} == {"no verdict"}


def test_quality_is_drawn_against_cost_with_better_up(made: Comparison) -> None:
    loss, identity = cost_charts(made, summary_rows(made))
    for chart, up in ((loss, -1), (identity, 1)):
        (axes,) = chart.figure.axes
        low, high = axes.get_ylim()
        assert (high - low) * up > 0, "better is up"
    mark = drawn_lines(loss, made.variants)["good"][-1]
    (x,), (y,) = points(mark)
    assert x == pytest.approx(20.0, abs=0.5) and y == pytest.approx(-0.1, abs=0.03)
    texts = [row for readout in loss.readouts for _, row in readout.rows]
    assert texts[0] == "the baseline" and any("at +20" in text for text in texts)


def test_names_beside_the_marks_overlap_no_other_name_and_no_mark() -> None:
    """Ten variants of nearly the same loss and step time: names that find no place are left out."""
    folder = files("alignlab.experiments") / "results" / "all_objectives"
    found = load_comparison(Path(str(folder))).comparison
    for chart in cost_charts(found, summary_rows(found)):
        (axes,) = chart.figure.axes
        boxes = [text.get_window_extent() for text in axes.texts]
        assert 3 <= len(boxes) <= 9, "most names are there"
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        marks = [p for line in axes.lines if len(p := np.asarray(line.get_xydata())) == 1]
        places = axes.transData.transform(np.concatenate(marks))
        assert not any(box.contains(*place) for box in boxes for place in places)


def test_without_step_times_there_is_no_cost_chart(made: Comparison) -> None:
    timeless = [
        dataclasses.replace(run, metrics={k: v for k, v in run.metrics.items() if k != "time/step"})
        for run in made.results
    ]
    found = dataclasses.replace(made, results=tuple(timeless))
    assert cost_charts(found, summary_rows(found)) == []


PLACES = st.tuples(st.integers(-5, 5), st.integers(-5, 5))


@given(st.lists(PLACES, min_size=1, max_size=8), st.booleans())
def test_the_front_is_what_no_other_beats_in_both(points_: Any, higher: bool) -> None:
    sign = 1 if higher else -1
    front = pareto_front(points_, higher=higher)
    beaten = {
        p
        for p in points_
        for q in points_
        if q != p and q[0] <= p[0] and sign * q[1] >= sign * p[1]
    }
    assert set(front) == set(points_) - beaten
    assert front == sorted(front) and len(front) == len(set(front))
