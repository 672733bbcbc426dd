"""What a report says of runs that diverged, and of samples that had nothing to align."""

from dataclasses import replace

import pytest

from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.report.run_warnings import aligned_footnotes
from alignlab.experiments.report.summary import footnotes, summary_rows
from alignlab.experiments.report.text import markdown
from alignlab.experiments.report.verdict import Verdict, verdict
from made_comparisons import make_comparison

WIGGLE = (0.0, 0.003, -0.002, 0.001, -0.001)


def run(variant: str, seed: int, flow: float) -> RunResult:
    metrics = {"val/flow": flow + WIGGLE[seed] * (variant != "none"), "cross_cos/mean": 0.5}
    return RunResult(variant, seed, 10, "", metrics, {})


def comparison(diverged: dict[str, list[int]], num_seeds: int = 5) -> Comparison:
    flows = {"none": 0.4, "good": 0.3, "wild": 0.3}
    results = [
        replace(run(variant, seed, flow), diverged=seed in diverged.get(variant, []))
        for variant, flow in flows.items()
        for seed in range(num_seeds)
    ]
    return make_comparison(results)


def said(found: Comparison) -> Verdict:
    return verdict(found, summary_rows(found))


def test_a_variant_that_diverged_has_no_other_verdict() -> None:
    found = comparison({"wild": [1, 3]})
    words = said(found)
    against = "Against the baseline none, over 5 seeds: better on something: good"
    assert words.lead == f"{against}; DIVERGED: wild."
    assert words.variants["wild"] == (
        "wild DIVERGED with seeds 1 and 3 (its validation loss ended far above its start): "
        "nothing is claimed of it."
    )
    rows = {row.variant: row for row in summary_rows(found) if row.metric == "val/flow"}
    assert (rows["good"].change, rows["wild"].change) == ("better", "")
    assert rows["wild"].value_text.endswith("†") and "diverged with seed 1, 3" in rows["wild"].flag
    assert any(
        note.startswith("Runs that diverged: wild (seed 1, 3).")
        for note in footnotes(found, summary_rows(found))
    )
    assert "wild DIVERGED" in markdown(found, summary_rows(found))


def test_a_variant_that_diverged_counts_in_the_correction_of_the_others() -> None:
    found = comparison({"wild": [1]})
    (good,) = [
        row.paired
        for row in summary_rows(found)
        if row.metric == "val/flow" and row.variant == "good"
    ]
    assert good is not None and good.holm_p is not None and good.p_value is not None
    assert good.holm_p == pytest.approx(2 * good.p_value)
    assert "Holm's correction over 2 variants" in said(found).reading


def test_of_nothing_but_diverged_variants_no_change_is_denied() -> None:
    words = said(comparison({"good": [0], "wild": [0, 1, 2, 3, 4]}))
    assert words.lead == "Against the baseline none, over 5 seeds: DIVERGED: good, wild."


def test_a_baseline_that_diverged_leaves_no_verdict() -> None:
    found = comparison({"none": [2]})
    words = said(found)
    assert words.lead.startswith("No verdict: the baseline diverged. none DIVERGED with seed 2")
    assert words.variants == {}
    assert not any(row.change for row in summary_rows(found))


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_few_seeds_are_enough_to_see_it(num_seeds: int) -> None:
    words = said(comparison({"wild": [0]}, num_seeds))
    assert "no verdict" in words.lead and "wild DIVERGED with seed 0 (its" in words.lead


def test_samples_that_had_something_to_align_are_counted() -> None:
    counts = {("none", 0): {}, ("ra", 0): {"ra": (63, 100)}, ("ra", 1): {"ra": (64, 100)}}
    counts |= {("both", 0): {"ra": (100, 100), "re": (1, 10_000)}}
    results = [
        replace(run(variant, seed, 0.4), aligned=aligned)
        for (variant, seed), aligned in counts.items()
    ]
    found = make_comparison(results)
    (note,) = aligned_footnotes(found)
    assert "all seeds together: ra: ra 63.5% of 200; both: ra 100% of 100, re 0.1% of" in note
    assert note in footnotes(found, summary_rows(found))
    assert aligned_footnotes(comparison({})) == []


def test_both_survive_the_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("made") / "comparison.json"
    result = replace(run("none", 0, 0.4), aligned={"ra": (1, 2)}, diverged=True)
    found = make_comparison([result])
    found.save(path)
    assert Comparison.load(path) == found
