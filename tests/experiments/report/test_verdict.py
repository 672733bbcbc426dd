"""The verdict in words: no claim without its interval, and silence where nothing can be told."""

import math
import re

import pytest

from alignlab.experiments.compare.result import RunResult
from alignlab.experiments.report.summary import summary_rows
from alignlab.experiments.report.verdict import Verdict, verdict
from made_comparisons import make_comparison

Runs = dict[str, list[dict[str, float]]]
WIGGLE = (0.0, 0.003, -0.002, 0.001, -0.001, 0.002, -0.003, 0.0005, 0.0015, -0.0015, 0.0)


def said(variants: Runs, baseline: str = "none") -> Verdict:
    results = [
        RunResult(variant, seed, 10, "", metrics, {})
        for variant, runs in variants.items()
        for seed, metrics in enumerate(runs)
    ]
    found = make_comparison(results, baseline=baseline, variants=tuple(variants))
    return verdict(found, summary_rows(found))


def runs(num_seeds: int, **metrics: float) -> list[dict[str, float]]:
    """Numbers that vary a little from seed to seed, each metric in its own way."""
    names = {"flow": "val/flow", "retrieval": "retrieval/mean", "time": "time/step"}
    return [
        {
            names[key]: value * (1 + WIGGLE[(seed * (place + 2) + place) % len(WIGGLE)])
            for place, (key, value) in enumerate(metrics.items())
        }
        for seed in range(num_seeds)
    ]


def base(num_seeds: int) -> list[dict[str, float]]:
    return [
        {"val/flow": 0.4 + 0.1 * seed, "retrieval/mean": 0.5, "time/step": 2.0}
        for seed in range(num_seeds)
    ]


def moved(num_seeds: int, flow: float, retrieval: float, time: float) -> list[dict[str, float]]:
    shift = runs(num_seeds, flow=1.0, retrieval=1.0, time=1.0)
    return [
        {
            "val/flow": 0.4 + 0.1 * seed + shift[seed]["val/flow"] - 1.0 + flow,
            "retrieval/mean": 0.5 + shift[seed]["retrieval/mean"] - 1.0 + retrieval,
            "time/step": 2.0 * (shift[seed]["time/step"] + time),
        }
        for seed in range(num_seeds)
    ]


def test_the_sentence_of_a_variant() -> None:
    words = said({"none": base(5), "refalign": moved(5, 0.0, 0.12, 0.03)})
    assert words.lead == "Against the baseline none, over 5 seeds: better on something: refalign."
    assert re.fullmatch(
        r"refalign \(5 seeds\): raises subject retrieval by "
        r"0\.1\d+ \[0\.1\d+, 0\.1\d+\] \(better\); "
        r"[23]\.\d+% \[\d\.\d+%, \d\.\d+%\] slower; "
        r"no detectable change in validation flow loss \(could have seen 0\.00\d+\)\.",
        words.variants["refalign"],
    ), words.variants["refalign"]
    assert "Student's t (a bootstrap of fewer than 10 seeds is too narrow)" in words.reading
    assert "Holm" not in words.reading, "one variant: nothing to correct"


def test_a_lowered_quantity_is_told_by_its_size() -> None:
    words = said({"none": base(5), "a": moved(5, -0.1, -0.2, -0.1), "b": moved(5, 0.1, 0.0, 0.0)})
    assert "lowers validation flow loss by 0." in words.variants["a"]
    assert "lowers subject retrieval by 0." in words.variants["a"]
    assert "% faster" not in words.variants["a"] and "] faster" in words.variants["a"]
    assert "(worse)" in words.variants["a"] and "(better)" in words.variants["a"]
    assert words.lead.endswith("better on something: a; worse on something: a, b.")
    assert "Holm's correction over 2 variants (95% or more)" in words.reading
    for sentence in words.variants.values():
        for claim in re.findall(r"(?:raises|lowers) [^;]*", sentence):
            assert re.search(r"by [\d.]+ \[[\d.]+, [\d.]+\]", claim), claim


def test_ten_seeds_are_told_by_the_bootstrap() -> None:
    words = said({"none": base(10), "a": moved(10, 0.0, 0.12, 0.0)})
    assert "BCa bootstrap and sign-flip test" in words.reading and "narrow" not in words.reading
    assert "raises subject retrieval by" in words.variants["a"]


@pytest.mark.parametrize(
    ("variants", "lead"),
    [
        ({"none": base(1), "a": moved(1, 1.0, 1.0, 1.0)}, "One seed: no verdict."),
        ({"none": base(2), "a": moved(2, 1.0, 1.0, 1.0)}, "2 seeds: no verdict."),
        ({"none": base(3)}, "Only the baseline none is here: there is nothing to compare."),
        ({"none": [{"x": 1.0}] * 3, "a": [{"x": 2.0}] * 3}, "No headline metric with a better"),
        ({"none": [{"time/step": 1.0}] * 3, "a": [{"time/step": 2.0}] * 3}, "No headline metric"),
    ],
)
def test_no_verdict(variants: Runs, lead: str) -> None:
    words = said(variants)
    assert words.lead.startswith(lead)
    assert words.variants == {} and words.sentences == [words.lead]


def test_what_cannot_be_told_is_named() -> None:
    jump = [{"val/flow": 0.4 + 0.1 * seed + 0.25, "time/step": 2.0} for seed in range(4)]
    wild = [{"val/flow": math.nan, "retrieval/mean": 0.5} for _ in range(4)]
    words = said({"none": base(4), "jump": jump, "wild": wild, "late": moved(2, 0.0, 0.0, 0.0)})
    assert words.lead.endswith("no change of quality can be told from chance.")
    assert "+0.2500 with every seed: no spread to judge it by" in words.variants["jump"]
    assert "subject retrieval (not measured)" in words.variants["jump"]
    assert "exactly the baseline's step time" in words.variants["jump"]
    assert "validation flow loss (not finite with seed 0, 1, 2, 3)" in words.variants["wild"]
    assert "exactly the baseline's subject retrieval" in words.variants["wild"]
    assert words.variants["late"].startswith("late (2 seeds): cannot tell for validation flow loss")
    assert "(2 of 4 seeds have it)" in words.variants["late"]
