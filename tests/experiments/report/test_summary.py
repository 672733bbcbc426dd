"""The numbers of a report: pairing, text, notes and their JSON form."""

import doctest
import json
import math
import statistics
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.compare.result import Comparison, RunResult, SampleClip
from alignlab.experiments.report import formatting as numbers
from alignlab.experiments.report.formatting import (
    format_duration,
    format_interval,
    format_number,
    format_spread,
)
from alignlab.experiments.report.metric_table import quantity
from alignlab.experiments.report.summary import SummaryRow, footnotes, joined, summary_rows
from alignlab.recipe import to_yaml
from made_comparisons import make_comparison

MINUS = "\N{MINUS SIGN}"


def comparison(
    values: dict[str, dict[int, dict[str, float]]],
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    baseline: str = "none",
) -> Comparison:
    results = tuple(
        RunResult(variant, seed, 10, f"{variant}/{seed}", metrics, {})
        for variant, runs in values.items()
        for seed, metrics in runs.items()
    )
    return make_comparison(results, baseline=baseline, seeds=seeds, variants=tuple(values))


def flow(**variants: list[float]) -> Comparison:
    return comparison(
        {
            name: {seed: {"val/flow": value} for seed, value in enumerate(values)}
            for name, values in variants.items()
        },
        seeds=tuple(range(max(len(values) for values in variants.values()))),
    )


def row_of(found: Comparison, variant: str, metric: str = "val/flow") -> SummaryRow:
    rows = [r for r in summary_rows(found) if (r.variant, r.metric) == (variant, metric)]
    assert len(rows) == 1
    return rows[0]


def test_mean_spread_and_paired_difference_by_hand() -> None:
    # Seeds differ far more than variants: only the paired difference shows the effect.
    found = flow(none=[0.40, 0.50, 0.60], ra=[0.39, 0.48, 0.59])
    row = row_of(found, "ra")
    assert row.mean == pytest.approx(0.486666667)
    assert row.std == pytest.approx(statistics.stdev([0.39, 0.48, 0.59]))
    assert row.paired is not None
    assert row.paired.mean == pytest.approx(-0.0133333333)
    assert row.paired.std == pytest.approx(0.0057735027)
    assert joined(row.text) == "0.49 ± 0.10"
    assert row.diff_text == f"{MINUS}0.013 [{MINUS}0.028, 0.001]"
    assert (row.p_text, row.change) == ("0.057", "")
    assert (row.agreement, row.is_bold) == ("3/3", False), "the best mean, but no claim"
    base = row_of(found, "none")
    assert (base.diff_text, base.agreement, base.paired) == ("", "", None)


def test_pairs_follow_seeds_not_positions() -> None:
    found = comparison(
        {
            "none": {0: {"val/flow": 1.0}, 2: {"val/flow": 3.0}},
            "ra": {2: {"val/flow": 2.5}, 1: {"val/flow": 9.0}},
        }
    )
    row = row_of(found, "ra")
    assert row.differences == {2: -0.5}
    assert row.value_text.endswith("†")
    assert row.flag == "2 of 3 seeds"


@pytest.mark.parametrize(
    ("metric", "values", "better"),
    [
        ("val/flow", [1.0, 0.9], 1),
        ("teacher_retrieval/mean", [1.0, 0.9], 0),
        ("cknna/block3", [1.0, 0.9], None),
        ("my/own", [1.0, 0.9], None),
        ("time/step", [1.0, 0.9], 1),
        ("val/flow", [1.0, 1.0], 0),
    ],
)
def test_direction_decides_what_is_better(
    metric: str, values: list[float], better: int | None
) -> None:
    runs = {n: {0: {metric: v}} for n, v in zip(("none", "ra"), values, strict=True)}
    found = comparison(runs, seeds=(0,))
    assert row_of(found, "ra", metric).num_better == better
    assert not any(row.is_bold for row in summary_rows(found)), "one seed"


def test_order_headline_first_costs_last_blocks_by_number() -> None:
    metrics = {
        "time/step": 1.0,
        "zzz": 1.0,
        "silhouette/block10": 1.0,
        "silhouette/block9": 1.0,
        "silhouette/mean": 1.0,
        "val/flow/t3": 1.0,
        "val/flow": 1.0,
    }
    rows = summary_rows(comparison({"none": {0: metrics}}, seeds=(0,)))
    assert [row.metric for row in rows] == [
        "val/flow",
        "silhouette/mean",
        "val/flow/t3",
        "silhouette/block9",
        "silhouette/block10",
        "zzz",
        "time/step",
    ]
    assert [row.metric for row in rows if row.headline] == [
        "val/flow",
        "silhouette/mean",
        "time/step",
    ]


def test_labels_say_block_depth_and_timestep() -> None:
    assert quantity("teacher_retrieval/block3").label.endswith("block 3 (depth 4)")
    assert quantity("val/flow/t9").label == "validation flow loss, t 0.9 to 1.0"
    assert quantity("my/own").label == "my/own"


def test_bins_of_an_expert_are_of_its_window() -> None:
    labels = []
    for expert in (None, "low"):
        recipe = to_yaml({"name": "x", "model": {"path": "p", "expert": expert}, "steps": 1})
        made = make_comparison([], recipe=recipe, variants=("none",))
        labels.append(made.quantity("val/flow/t9").label)
    assert labels == [
        "validation flow loss, t 0.9 to 1.0",
        "validation flow loss, tenth 10 of the low-noise expert's t",
    ]


def test_one_seed_has_no_spread_and_the_report_says_so() -> None:
    found = flow(none=[0.5], ra=[0.4])
    row = row_of(found, "ra")
    assert (row.std, row.text[1], row.agreement, row.p_text) == (None, "", "", "")
    assert row.diff_text == f"{MINUS}0.1000"
    rows = summary_rows(found)
    assert any("One seed (0) only" in note for note in footnotes(found, rows))


def test_missing_and_unfinite_numbers_are_named() -> None:
    found = comparison(
        {
            "none": {0: {"val/flow": 1.0, "silhouette/mean": 0.1, "x": 1.0}, 1: {"val/flow": 1.0}},
            "ra": {0: {"val/flow": math.nan, "x": 1.0}, 1: {"val/flow": 0.5, "x": 2.0}},
            "lost": {0: {"val/flow": 0.4, "silhouette/mean": 0.2, "x": 1.0}},
        },
        seeds=(0, 1),
    )
    rows = summary_rows(found)
    assert row_of(found, "ra").text == ("not finite", "")
    assert row_of(found, "ra", "silhouette/mean").text == ("—", "")
    notes = "\n".join(footnotes(found, rows))
    assert "Runs without a result: lost (seed 1)." in notes
    assert "(val/flow): ra: not finite with seed 0." in notes
    assert "(silhouette/mean): none: 1 of 2 seeds, ra: not measured." in notes
    assert "1 more metrics lack numbers" in notes
    assert row_of(found, "ra").diff_text == "—"


def test_rounding_is_shown_as_zero() -> None:
    # 0.1 + 0.2 is not 0.3 in binary; the means of b differ from zero by rounding alone
    found = flow(none=[0.3, 0.3, 0.3], a=[0.1 + 0.2] * 3, b=[0.3 - 0.01, 0.3 + 0.01, 0.3])
    a, b = row_of(found, "a"), row_of(found, "b")
    assert (a.diff_text, a.agreement, a.change) == ("0", "", "")
    assert b.paired is not None and b.paired.mean == 0.0
    assert row_of(flow(none=[0.1 + 0.2, 0.3, 0.3]), "none").text == ("0.3000", "0")


@pytest.mark.parametrize(
    ("metric", "shift", "change"),
    [
        ("val/flow", -0.1, "better"),
        ("val/flow", 0.1, "worse"),
        ("teacher_retrieval/mean", 0.1, "better"),
        ("teacher_retrieval/mean", -0.1, "worse"),
        ("cknna/block3", 0.1, "changed"),
        ("val/flow", 0.0, ""),
    ],
)
def test_a_claim_has_a_direction(metric: str, shift: float, change: str) -> None:
    base = {seed: {metric: 1.0 + seed} for seed in range(4)}
    moved = {seed: {metric: 1.0 + seed + shift * (1 + 0.01 * seed)} for seed in range(4)}
    found = comparison({"none": base, "ra": moved}, seeds=(0, 1, 2, 3))
    assert row_of(found, "ra", metric).change == change
    bold = [row.variant for row in summary_rows(found) if row.is_bold]
    assert bold == (["ra"] if change == "better" else [])


def test_numbers_read_well() -> None:
    assert doctest.testmod(numbers).failed == 0
    assert format_number(0.0) == "0"
    assert format_number(-0.00001, sign=True) == f"{MINUS}1e{MINUS}05"
    assert format_number(1.2345e10) == "1.234e+10"
    assert format_number(99999.6) == "100,000"
    assert format_number(math.inf) == "not finite"
    assert format_spread(12345678.0, 0.001) == ("12,345,678", "0.001000")
    assert format_spread(0.0, 0.0) == ("0", "0")
    assert format_spread(-1e-9, 0.5, sign=True) == ("0.00", "0.50")
    assert format_spread(-9e-5, 0.0042, sign=True) == (f"{MINUS}0.0001", "0.0042")
    assert format_interval(-1e-9, -2e-9, 3.0) == "0.0 [0.0, 3.0]"
    assert format_interval(2e-9, 1e-9, 3e-9) == "2e-09 [1e-09, 3e-09]".replace("-", MINUS)
    assert format_interval(24.0, -1500.0, 1548.0, sign=True) == f"+24 [{MINUS}1,500, 1,548]"
    assert format_spread(1411.0, 23.4) == ("1,411", "23")
    assert format_spread(0.5, None, sign=True) == ("+0.5000", "")
    assert format_duration(3600 * 30 + 61) == "30 h 1 min"


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    clip = SampleClip("k", "a <b> & ü", "v.mp4", None, ("r.png",))
    run = RunResult(
        "none",
        3,
        7,
        "none/3",
        {"val/flow": 0.1 + 0.2, "sick": math.inf, "tiny": 5e-324},
        {"loss/flow": ((1, 0.5), (2, -math.inf))},
        (clip,),
    )
    found = Comparison(
        "n", "none", (3,), ("none",), "a: 1\n", {"x": {"none": [1, None]}}, {"t": {"y": 2}},
        12.5, "alignlab compare n", "abc", (run,),
    )  # fmt: skip
    path = tmp_path / "comparison.json"
    found.save(path)
    assert Comparison.load(path) == found
    nan = comparison({"none": {0: {"val/flow": math.nan}}})
    nan.save(path)
    assert math.isnan(Comparison.load(path).results[0].metrics["val/flow"])


def test_the_headline_of_older_files_is_dropped(tmp_path: Path) -> None:
    made_up = comparison({"none": {0: {"val/flow": math.inf}}})
    path = tmp_path / "comparison.json"
    made_up.save(path)
    content = json.loads(path.read_text())
    assert "headline" not in content
    for headline in ([], ["val/flow"]):
        path.write_text(json.dumps(content | {"headline": headline}))
        assert Comparison.load(path) == made_up
    path.write_text(json.dumps(content | {"headlines": []}))
    with pytest.raises(UserError, match="not a comparison: headlines: "):
        Comparison.load(path)


def test_unreadable_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    with pytest.raises(UserError, match=r"comparison\.json: no such file"):
        Comparison.load(path)
    path.write_text('{"name": "x"}')
    with pytest.raises(UserError, match="not a comparison: baseline: Field required") as info:
        Comparison.load(path)
    assert "\n" not in str(info.value)


def test_inconsistent_results_are_refused() -> None:
    with pytest.raises(ValueError, match="baseline 'none' is not one of"):
        comparison({"ra": {0: {}}})
    with pytest.raises(ValueError, match="belongs to no variant and seed"):
        comparison({"none": {7: {}}})
    run = RunResult("none", 0, 1, "", {}, {})
    with pytest.raises(ValueError, match="given twice"):
        Comparison("n", "none", (0,), ("none",), "", {}, {}, 0.0, "", "", (run, run))
