"""Whatever the numbers, what a report shows and what it claims cannot contradict each other."""

import csv
import io
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from alignlab.experiments.compare.result import Comparison, Cost, Ratio, RunResult, VariantCost
from alignlab.experiments.report.latex import table_tex
from alignlab.experiments.report.statistics import ALPHA, MIN_PAIRS
from alignlab.experiments.report.summary import SummaryRow, by_metric, summary_rows
from alignlab.experiments.report.text import markdown, print_summary, table_csv
from alignlab.experiments.report.verdict import verdict
from alignlab.experiments.report.write import write_report
from made_comparisons import make_comparison

METRICS = ("val/flow", "silhouette/mean", "cross_cos/mean", "time/step", "cknna/mean")
MINUS = "\N{MINUS SIGN}"
NUMBER = rf"[+{MINUS}]?[\d,.]+(?:e[+{MINUS}]?\d+)?"
INTERVAL = re.compile(rf"\[({NUMBER})%?, ({NUMBER})%?\]")
# A spread around shifts of all sizes, so that claims are made, missed and in between.
NOISE = st.floats(-1.0, 1.0, allow_subnormal=False)
SHIFT = st.sampled_from([0.0, 0.0, 0.1, -0.3, 0.6, -1.0, 3.0])


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    """Up to four variants and a baseline, of one to eleven seeds, with some runs missing."""
    variants = ["none", *"abcd"[: draw(st.integers(1, 4))]]
    seeds = range(draw(st.sampled_from([1, 2, 3, 3, 4, 5, 6, 10, 11])))
    results = []
    for variant in variants:
        shifts = {metric: 0.0 if variant == "none" else draw(SHIFT) for metric in METRICS}
        for seed in seeds:
            if draw(st.integers(0, 19)) == 0:
                continue
            values = {m: 5.0 + seed + shifts[m] + 0.3 * draw(NOISE) for m in METRICS}
            last = values["val/flow"]  # with steps to target, of seeds that reach it and do not
            measured = {"val/flow": tuple((s, last + 0.2 * (10 - s)) for s in (2, 4, 6, 8, 10))}
            results.append(RunResult(variant, seed, 10, "", values, {}, measured=measured))
    return make_comparison(
        results, variants=tuple(variants), seeds=tuple(seeds), cost=draw(costs(variants))
    )


def costs(variants: list[str]) -> st.SearchStrategy[Cost | None]:
    ratio = st.tuples(*[st.floats(0.5, 2.0)] * 3, st.floats(0.0, 0.2)).map(
        lambda drawn: Ratio(sorted(drawn[:3])[1], min(drawn[:3]), max(drawn[:3]), drawn[3])
    )

    def cost(ratios: list[Ratio]) -> Cost:
        by_variant = {"none": Ratio(1.0), **dict(zip(variants[1:], ratios, strict=True))}
        return Cost(10, 4, 0, "cpu", 0.1, {
            v: VariantCost(r.value, r, int(1e9 * r.value), None, 1) for v, r in by_variant.items()
        })  # fmt: skip

    ratios = st.lists(ratio, min_size=len(variants) - 1, max_size=len(variants) - 1)
    return st.none() | ratios.map(cost)


def number(text: str) -> float:
    return float(text.replace(MINUS, "-").replace(",", ""))


def shown_to_exclude_zero(text: str) -> bool:
    """Of the last interval in a text, or of the number itself where it has none."""
    found = INTERVAL.findall(text)
    ends = [number(end) for end in found[-1]] if found else []
    return bool(ends) and not min(ends) <= 0.0 <= max(ends)


def check_row(row: SummaryRow) -> None:
    claimed = bool(row.change)
    if row.ratio is None or row.ratio.low is not None:
        assert shown_to_exclude_zero(row.diff_text) == claimed, row
    if row.paired is not None and row.p_text:
        assert row.num_seeds >= MIN_PAIRS
        p = row.paired.holm_p
        assert p is not None and (p <= ALPHA or not claimed)
        if row.paired.method == "t":
            assert (p <= ALPHA) == claimed and (number(row.p_text.strip("<")) <= ALPHA) == claimed
    elif row.ratio is None:
        assert not claimed
    assert row.is_bold == (row.change == "better")


@settings(max_examples=40, deadline=None)
@given(comparisons())
def test_a_change_is_claimed_exactly_where_its_interval_excludes_zero(found: Comparison) -> None:
    rows = summary_rows(found)
    for row in rows:
        check_row(row)
    check_verdict(found, rows)
    check_forms(found, rows)


def check_verdict(found: Comparison, rows: list[SummaryRow]) -> None:
    """Every interval of a sentence stands in a clause of its kind."""
    for sentence in verdict(found, rows).variants.values():
        for clause in sentence.split(": ", 1)[1].rstrip(".").split("; "):
            claims = not re.match("no detectable|cannot tell|exactly", clause)
            for interval in INTERVAL.finditer(clause):
                assert shown_to_exclude_zero(interval[0]) == claims, clause


def check_forms(found: Comparison, rows: list[SummaryRow]) -> None:
    """The same differences in every form, and the same numbers in bold."""
    groups = [group for group in by_metric(rows) if group[0].headline]
    bold = [row.value_text for group in groups for row in group if row.is_bold]
    assert re.findall(r"\*\*([^*|]+)\*\* \|", markdown(found, rows)) == bold
    by_variant = [row for place in range(len(found.variants)) for row in [g[place] for g in groups]]
    tex = table_tex(found, rows)
    assert tex.count(r"\textbf{") == len(bold)
    stars = sum(bool(row.change) and row.ratio is None for row in by_variant)
    assert tex.count("{*}") == stars + (len(found.seeds) >= MIN_PAIRS)
    lines = list(csv.DictReader(io.StringIO(table_csv(found, rows))))
    for row, line in zip(rows, lines, strict=True):
        assert line["change"] == row.change and "is_best" not in line
        low, high = (line["diff_low"], line["diff_high"])
        if row.ratio is not None and row.ratio.low is not None:
            low, high = (float(line[f"ratio_{end}"]) - 1.0 for end in ("low", "high"))
        if low != "":
            assert bool(row.change) == (not float(low) <= 0.0 <= float(high))
    console = Console(file=io.StringIO(), width=300, force_terminal=True)
    print_summary(found, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    for group in groups:
        for row in group:
            assert row.diff_text in printed
            if row.is_bold:
                assert re.search(rf"\x1b\[1m *{re.escape(row.value_text)}", printed)


def test_the_page_sets_in_bold_what_is_claimed(tmp_path: Path) -> None:
    shifts = {"none": 0.0, "better": -1.0, "worse": 1.0, "same": 0.0}
    results = [
        RunResult(v, seed, 10, "", {"val/flow": 5.0 + seed + shift + wiggle}, {})
        for place, (v, shift) in enumerate(shifts.items())
        for seed, wiggle in enumerate((0.0, 0.01 * place, -0.02 * place, 0.005 * place))
    ]
    found = make_comparison(results)
    page = write_report(found, tmp_path).read_text()
    cell = r'<td[^>]*class="claimed"[^>]*>\s*<span class="mean">([^<]*)'
    (better,) = (row for row in summary_rows(found) if row.variant == "better")
    assert re.findall(cell, page) == [better.text[0], better.value_text]
