"""What a comparison holds besides its variants' runs, in a part of it and in several as one."""

import dataclasses
from pathlib import Path

import pytest

from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.finding import Expectation, Finding
from alignlab.experiments.compare.merge import merged
from alignlab.experiments.compare.result import Budget, Comparison, Cost, Ratio, VariantCost
from alignlab.experiments.compare.subset import subset
from alignlab.experiments.report.noise_floor import noise_floor
from alignlab.experiments.report.summary import summary_rows
from recipe_comparisons import recipe_comparison, run_of

VARIANTS = ("none", "refalign", "repa")
FINDING = Finding(
    claim="it helps",
    source="a paper",
    limits="it is small",
    expect=(Expectation(variant="repa", metric="val/flow", change="lower"),),
)


def with_extras(seeds: tuple[int, ...] = (0, 1, 2)) -> Comparison:
    """With a finding, a second training of the baseline, a cost and a budget."""
    again = [dataclasses.replace(run_of("none", seed), variant="none-again") for seed in seeds]
    cost = VariantCost(0.1, Ratio(1.0), 100, None, 5)
    ratios = {"none": 1.0, "refalign": 2.0, "repa": 4.0}
    return recipe_comparison(
        VARIANTS,
        seeds,
        overrides=("aa=true",),
        again=tuple(again),
        finding=FINDING,
        cost=Cost(10, 4, 0, "cpu", 0.01, dict.fromkeys(VARIANTS, cost)),
        budget=Budget("compute", ratios, {v: round(80 / r) for v, r in ratios.items()}),
    )


def test_seeds_of_all_runs_are_chosen() -> None:
    part = subset(with_extras(), seeds=(0, 2))
    assert [run.seed for run in part.again] == [0, 2] and part.finding == FINDING
    assert len(part.results) == 6 and part.cost is not None


def test_variants_of_all_facts_are_chosen(caplog: pytest.LogCaptureFixture) -> None:
    part = subset(with_extras(), variants=("refalign",))
    assert part.variants == ("none", "refalign")
    assert len(part.again) == 3 and part.finding is None
    assert "the published finding is of all that the recipe compares" in caplog.text
    assert part.cost is not None and list(part.cost.variants) == ["none", "refalign"]
    assert part.budget is not None and list(part.budget.steps) == ["none", "refalign"]
    assert subset(with_extras(), variants=("repa",)).finding == FINDING


def test_another_baseline_has_no_second_training_and_other_ratios(
    caplog: pytest.LogCaptureFixture,
) -> None:
    part = subset(with_extras(), baseline="refalign")
    assert part.again == () and part.finding is None and part.cost is None
    assert part.budget is not None
    assert part.budget.ratios == {"none": 0.5, "refalign": 1.0, "repa": 2.0}
    assert "the cost of a step was measured against none" in caplog.text


@pytest.mark.parametrize(
    ("metrics", "judged"),
    [(("val/flow",), True), (("steps_to_target",), True), (("cross_cos/mean",), False)],
)
def test_a_finding_needs_its_metrics(metrics: tuple[str, ...], judged: bool) -> None:
    part = subset(with_extras(), metrics=metrics)
    assert (part.finding == FINDING) == judged


def merge_of(*comparisons: Comparison, baseline: str | None = None) -> Comparison:
    sources = [(Path(f"folder-{place}"), one) for place, one in enumerate(comparisons)]
    return merged(sources, Path("out"), baseline=baseline)


def test_second_trainings_and_findings_are_merged(tmp_path: Path) -> None:
    found = merge_of(with_extras((0, 1)), with_extras((1, 2)))
    assert [(run.variant, run.seed) for run in found.again] == [
        ("none-again", seed) for seed in (0, 1, 2)
    ]
    assert found.finding == FINDING
    floor = noise_floor(found, summary_rows(found))
    assert floor is not None and floor.rows[0].differences.keys() == {0, 1, 2}
    path = tmp_path / "merged.yaml"
    path.write_text(found.recipe)
    config = load_compare(path)
    assert config.aa and config.finding == FINDING


def test_what_is_of_another_baseline_or_finding_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two = (dataclasses.replace(with_extras(s), budget=None) for s in ((0, 1), (2, 3)))
    found = subset(merge_of(one, two, baseline="refalign"), baseline="refalign")
    assert found.again == () and found.finding is None
    other = FINDING.model_copy(update={"claim": "it does not"})
    found = merge_of(one, dataclasses.replace(two, finding=other))
    assert found.finding is None and len(found.again) == 4
    assert "comparisons check different findings" in caplog.text
