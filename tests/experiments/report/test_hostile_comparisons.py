"""Any comparison is shown, whatever its texts and numbers are, and survives its file.

`ALIGNLAB_EXAMPLES=10000 ALIGNLAB_PAGES=300 pytest <this file>` tries more of them.
"""

import csv
import io
import math
import os
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from alignlab.errors import printable
from alignlab.experiments.compare.finding import Expectation, Finding
from alignlab.experiments.compare.result import (
    TUNED,
    Budget,
    Comparison,
    Cost,
    Ratio,
    RunResult,
    SampleClip,
    VariantCost,
)
from alignlab.experiments.report.by_step import steps_csv
from alignlab.experiments.report.latex import table_tex
from alignlab.experiments.report.noise_floor import noise_floor, noise_floor_csv
from alignlab.experiments.report.summary import summary_rows
from alignlab.experiments.report.text import markdown, print_summary, table_csv
from alignlab.experiments.report.write import write_report
from browser_tools import FIRST_SCRIPT
from made_comparisons import make_comparison

EXAMPLES = int(os.environ.get("ALIGNLAB_EXAMPLES", "40"))
PAGES = int(os.environ.get("ALIGNLAB_PAGES", "5"))

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "=1+1",
    '=HYPERLINK("http://x.test","a")',
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\x1b[31mred\x1b]0;title\x07",
    "a\x00b",
    "half \ud83d",
    "\u202egpj.exe",
    "# heading",
    "1. list",
    "```\n<b>out</b>\n```",
    "[link](javascript:alert(1))",
    "a|b\\|c",
    "{{ 7*7 }}{% raw %}",
    "%{y}<extra></extra>",
    r"\input{/etc/passwd}$^_&#",
    "[x]*",
    "line\r\nbreak\u2028",
    "",
    "\ufeff",
    "👩‍🚀 猫 عربي",
]
ODD_NUMBERS = [0.0, -0.0, 1e308, -1e308, 1.7e308, 5e-324, 1e-310, 1.0, math.nan, math.inf]
METRICS = [
    "val/flow",
    "val/flow/t3",
    "retrieval/mean",
    "teacher_retrieval/block2",
    "time/step",
    "memory/peak_mib",
    "params/extra",
    "gen/frechet",
]

texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), max_size=8))
numbers = st.one_of(st.sampled_from(ODD_NUMBERS), st.floats(), st.floats(-2, 2))
counts = st.one_of(st.integers(0, 40), st.integers(-(2**63), 2**63))
leaves = st.one_of(
    st.none(), st.booleans(), counts, st.floats(allow_nan=False, allow_infinity=False), texts
)
json_lists = st.lists(leaves, max_size=2)
json_values: st.SearchStrategy[Any] = st.one_of(
    leaves, json_lists, st.dictionaries(texts, leaves, max_size=2)
)
curves = st.dictionaries(
    st.one_of(st.sampled_from(["loss/flow", "val/flow", "retrieval/mean"]), texts),
    st.lists(st.tuples(st.integers(0, 500), numbers), max_size=5).map(tuple),
    max_size=2,
)


@st.composite
def same_or_any(draw: st.DrawFn, num: int) -> list[float]:
    """Numbers of several seeds: equal, close, or anything."""
    kind = draw(st.sampled_from(["equal", "close", "any"]))
    first = draw(numbers)
    if kind == "equal":
        return [first] * num
    if kind == "close":
        return [first * (1 + draw(st.sampled_from([0, 1e-16, 1e-9, 0.01]))) for _ in range(num)]
    return [draw(numbers) for _ in range(num)]


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    variants = draw(st.lists(texts, min_size=1, max_size=3, unique=True))
    num_seeds = draw(st.sampled_from([1, 1, 2, 3, 3, 4, 11]))
    seeds = tuple(draw(st.permutations(range(20)))[:num_seeds])
    metrics = draw(st.lists(st.one_of(st.sampled_from(METRICS), texts), max_size=4, unique=True))
    results = []
    for variant in variants:
        by_metric = {metric: draw(same_or_any(len(seeds))) for metric in metrics}
        for place, seed in enumerate(seeds):
            if draw(st.integers(0, 9)) == 0:
                continue
            kept = {m: v[place] for m, v in by_metric.items() if draw(st.integers(0, 9))}
            results.append(draw(runs(variant, seed, kept)))
    baseline, again = draw(st.sampled_from(variants)), []
    if f"{baseline}-again" not in variants:
        for seed in draw(st.lists(st.sampled_from(seeds), unique=True)):
            measured = {metric: draw(numbers) for metric in metrics}
            again.append(draw(runs(f"{baseline}-again", seed, measured)))
    subset = st.lists(st.sampled_from(variants), unique=True)
    by_variant = st.dictionaries(st.sampled_from(variants), json_values)
    shown = st.dictionaries(texts, by_variant, max_size=2)
    others = [v for v in variants if v != baseline and printable(v) == v]
    return Comparison(
        name=draw(texts),
        baseline=baseline,
        seeds=seeds,
        variants=tuple(variants),
        recipe=draw(texts),
        differing=draw(shown),
        environment=draw(st.dictionaries(texts, json_values, max_size=2)),
        duration_s=draw(numbers),
        command=draw(texts),
        commit=draw(texts),
        results=tuple(results),
        allowed=tuple(draw(st.lists(texts, max_size=1))),
        cost=draw(st.none() | costs(draw(subset))),
        budget=draw(st.none() | budgets(draw(subset))),
        tuning=draw(shown) | draw(tunings(variants)),
        again=tuple(again),
        finding=draw(st.none() | findings(others, metrics)) if others else None,
    )


def tunings(variants: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Facts that the report reads, of any shape."""
    points = st.lists(st.lists(leaves, min_size=1, max_size=3), max_size=4)
    found = json_values | points | st.sampled_from(["maximize", ["val/flow"]])
    facts = st.sampled_from([*TUNED, "tuning.metric"])
    return st.dictionaries(facts, st.dictionaries(st.sampled_from(variants), found), max_size=6)


def findings(variants: list[str], metrics: list[str]) -> st.SearchStrategy[Finding]:
    plain = texts.filter(lambda text: printable(text) == text)
    expectation = st.builds(
        Expectation,
        variant=st.sampled_from(variants),
        metric=st.sampled_from([*filter(lambda m: printable(m) == m, metrics), "steps_to_target"]),
        change=st.sampled_from(["lower", "higher"]),
        words=plain,
    )
    expectations = st.lists(expectation, min_size=1, max_size=3, unique_by=_named).map(tuple)
    sentence = plain.filter(bool)
    return st.builds(Finding, claim=sentence, source=sentence, limits=sentence, expect=expectations)


def _named(expected: Expectation) -> tuple[str, str]:
    return expected.variant, expected.metric


def runs(variant: str, seed: int, metrics: dict[str, float]) -> st.SearchStrategy[RunResult]:
    clips = st.builds(
        SampleClip,
        key=texts,
        caption=texts,
        video=st.just("none.mp4"),
        real=st.none(),
        references=st.just(()),
    )
    return st.builds(
        RunResult,
        variant=st.just(variant),
        seed=st.just(seed),
        steps=counts,
        run_dir=st.just("run"),
        metrics=st.just(metrics),
        curves=curves,
        samples=st.lists(clips, max_size=1).map(tuple),
        notes=st.lists(texts, max_size=1).map(tuple),
        aligned=st.dictionaries(texts, st.tuples(counts, counts), max_size=1),
        diverged=st.booleans(),
        measured=curves,
    )


def costs(variants: list[str]) -> st.SearchStrategy[Cost]:
    ratios = st.builds(Ratio, numbers, st.none() | numbers, st.none() | numbers, numbers)
    one = st.builds(
        VariantCost, numbers, ratios, st.integers(0, 10**400) | counts, st.none() | numbers, counts
    )
    return st.builds(
        Cost,
        rounds=counts,
        data_steps=counts,
        seed=counts,
        device=texts,
        beyond=numbers,
        variants=st.fixed_dictionaries(dict.fromkeys(variants, one)),
        unknown=st.lists(texts, max_size=1).map(tuple),
    )


def budgets(variants: list[str]) -> st.SearchStrategy[Budget]:
    return st.builds(
        Budget,
        kind=st.sampled_from(["wall_time", "compute"]),
        ratios=st.fixed_dictionaries(dict.fromkeys(variants, numbers)),
        steps=st.fixed_dictionaries(dict.fromkeys(variants, counts)),
    )


def many(examples: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=checks, derandomize=True
    )


@many(EXAMPLES)
@given(comparisons())
def test_any_comparison_is_shown_and_kept(tmp_path: Path, comparison: Comparison) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = summary_rows(comparison)
        report = markdown(comparison, rows)
        table = table_csv(comparison, rows)
        steps = steps_csv(comparison)
        latex = table_tex(comparison, rows)
        found = noise_floor(comparison, rows)
        floor = "" if found is None else noise_floor_csv(comparison, found)
        terminal = io.StringIO()
        print_summary(comparison, Console(file=terminal, width=120))
    for text in (report, table, steps, floor, latex, terminal.getvalue()):
        text.encode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert not re.search("<[a-z/!]", report.split("```")[0])
    for lines in map(io.StringIO, (table, steps, floor)):
        for cell in (cell for cells in csv.reader(lines) for cell in cells):
            if cell.startswith(("=", "+", "-", "@", "\t", "\r")):
                float(cell)
    path = tmp_path / "comparison.json"
    comparison.save(path)
    assert same(Comparison.load(path), comparison)


def test_a_variant_that_exploded_hides_no_difference_of_another() -> None:
    numbers_ = {"none": [0.2, 0.21, 0.2], "good": [0.1, 0.12, 0.11], "wild": [1e30, 3e30, 2e30]}
    runs_ = [
        RunResult(variant, seed, 1, "run", {"val/flow": value}, {})
        for variant, values in numbers_.items()
        for seed, value in enumerate(values)
    ]
    rows = {row.variant: row for row in summary_rows(make_comparison(runs_))}
    assert rows["good"].diff_text.startswith("\N{MINUS SIGN}0.093")
    assert rows["good"].change == "better"


def test_no_script_of_a_name_runs(browser: ModuleType, tmp_path: Path) -> None:
    attack = "document.title = 'ran'"
    names = [
        f'<img src=x onerror="{attack}">',
        f"</script><script>{attack}</script>",
        f'"><a href="javascript:{attack}">%{{y}}',
    ]
    runs_ = [
        RunResult(name, seed, 1, "run", {"val/flow": 1e308 * seed}, {name: ((1, 1e308), (2, 0.5))})
        for name in names
        for seed in range(3)
    ]
    made = make_comparison(runs_, baseline=names[0], name=names[1], recipe=names[1])
    page = browser.with_script(
        write_report(made, tmp_path),
        """
        const shown = [...document.querySelectorAll(".plot")];
        const found = {
          title: document.title,
          drawn: shown.every((plot) => plot.querySelector("svg text")),
          variants: [...document.querySelectorAll(".legend button")].map((b) => b.textContent),
          told: told.names,
          odd: document.querySelectorAll("img, a[href^=javascript]").length,
        };""",
    )
    found, console = browser.opened(page)
    assert found["title"].endswith("alignlab comparison") and "rror" not in console
    assert found["drawn"] and found["odd"] == 0
    assert found["told"] == found["variants"] and len(found["told"]) == 3


def same(one: Any, other: Any) -> bool:
    """Equal, where NaN is NaN and 0.0 is not -0.0."""
    return repr(one) == repr(other)


@many(PAGES)
@given(comparisons())
def test_any_comparison_makes_a_page(tmp_path: Path, comparison: Comparison) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(comparison, tmp_path).read_text(encoding="utf-8")
    own = page.split(FIRST_SCRIPT)[0]
    assert "<script" not in own and "onerror" not in re.sub(r"&lt;.*?&gt;", "", own)
