"""Comparisons as one: merged seeds and variants are the comparison made at once, or are refused."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.errors import UserError
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.merge import merged
from alignlab.experiments.compare.rebuild import Choice, chosen
from alignlab.experiments.compare.result import (
    Budget,
    Comparison,
    Cost,
    Ratio,
    RunResult,
    VariantCost,
)
from alignlab.experiments.compare.subset import subset
from alignlab.experiments.report.summary import summary_rows
from alignlab.recipe import dump
from alignlab.runs.checksums import write_json
from recipe_comparisons import recipe_comparison, written

OUT = Path("out")


def merge_of(*comparisons: Comparison, baseline: str | None = None) -> Comparison:
    sources = [(Path(f"folder-{place}"), one) for place, one in enumerate(comparisons)]
    return merged(sources, OUT, baseline=baseline)


def what_counts(comparison: Comparison) -> Comparison:
    """Without how and where it was made."""
    runs = tuple(dataclasses.replace(run, run_dir="") for run in comparison.results)
    return dataclasses.replace(
        comparison, results=runs, duration_s=0.0, command="", name="", environment={}
    )


def test_merged_seeds_are_the_comparison_made_at_once() -> None:
    found = merge_of(recipe_comparison(seeds=(0, 1)), recipe_comparison(seeds=(2, 3)))
    whole = recipe_comparison(seeds=(0, 1, 2, 3))
    assert what_counts(found) == what_counts(whole)
    assert summary_rows(found) == summary_rows(whole)


def test_merged_variants_are_the_comparison_made_at_once() -> None:
    found = merge_of(
        recipe_comparison(("none", "refalign")), recipe_comparison(("none", "videorepa", "repa"))
    )
    variants = ("none", "refalign", "videorepa", "repa")
    whole = recipe_comparison(variants)
    assert found.variants == variants
    assert what_counts(found).results == what_counts(whole).results
    assert summary_rows(found) == summary_rows(whole)
    assert found.differing == whole.differing


def test_a_merged_recipe_makes_the_merged_comparison(tmp_path: Path) -> None:
    found = merge_of(
        recipe_comparison(("none", "refalign"), (0, 1)), recipe_comparison(("none", "repa"), (1, 2))
    )
    path = tmp_path / "merged.yaml"
    path.write_text(found.recipe)
    config = load_compare(path)
    assert tuple(config.variants) == ("none", "refalign", "repa") and config.seeds == (0, 1, 2)


def test_missing_runs_are_told_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    found = merge_of(
        recipe_comparison(("none", "refalign"), (0, 1, 2)),
        recipe_comparison(("none", "repa"), (2, 3)),
    )
    assert "3 of the runs of all variants with all seeds are missing" in caplog.text
    rows = {r.variant: r for r in summary_rows(found) if r.metric == "val/flow"}
    assert list(rows["repa"].differences) == [2, 3] and rows["repa"].flag == "2 of 4 seeds"
    assert list(rows["refalign"].differences) == [0, 1, 2]


def test_a_run_that_two_have_counts_once() -> None:
    one, other = recipe_comparison(seeds=(0, 1)), recipe_comparison(seeds=(1, 2))
    slower = tuple(
        dataclasses.replace(run, metrics=run.metrics | {"time/step": 9.0}) for run in other.results
    )
    found = merge_of(one, dataclasses.replace(other, results=slower))
    assert len(found.results) == 6
    assert what_counts(found).results[:4] == what_counts(one).results


def changed(comparison: Comparison, **changes: object) -> Comparison:
    runs = [dataclasses.replace(run, **changes) for run in comparison.results]  # type: ignore[arg-type]
    return dataclasses.replace(comparison, results=tuple(runs))


def of_seed_3(*overrides: str, **fields: Any) -> Comparison:
    return recipe_comparison(seeds=(3,), overrides=overrides, **fields)


def tuned() -> Comparison:
    facts: dict[str, dict[str, object]] = {
        "tuning.trials": {"none": None, "repa": 7},
        "tuning.searched": {"none": None, "repa": ["objectives.repa.weight"]},
    }
    facts |= {f"tuning.{n}": {"none": None, "repa": 1} for n in ("steps", "seeds", "metric")}
    return recipe_comparison(("none", "repa"), tuning=facts)


def with_flow(value: float) -> Comparison:
    other = recipe_comparison(seeds=(2, 3))
    runs = [
        dataclasses.replace(run, metrics=run.metrics | {"val/flow": value}) for run in other.results
    ]
    return dataclasses.replace(other, results=tuple(runs))


def from_a_sweep() -> str:
    """The recipe of a comparison whose refalign a sweep has tuned."""
    recipe = yaml.safe_load(recipe_comparison().recipe)
    recipe["variants"]["refalign"] = {"from": "runs/sweep/best.yaml"}
    return str(yaml.safe_dump(recipe))


OTHERS: dict[str, tuple[Callable[[], Comparison], str]] = {
    "shared": (
        lambda: of_seed_3("optim.lr=0.5"),
        r"^folder-0 and folder-1: .* other settings \(optim\.lr was 0\.001, is 0\.5\)",
    ),
    "measured": (
        lambda: of_seed_3("eval.clips=2"),
        r"share other settings \(eval\.clips was \d+, is 2\)",
    ),
    "variant": (
        lambda: of_seed_3("variants.refalign.objectives.ra.weight=0.25"),
        r"variant refalign has other settings \(objectives\.ra\.weight was .+, is 0\.25\)",
    ),
    "steps": (
        lambda: changed(of_seed_3(), steps=40),
        r"variant none has other settings \(its runs took 80 steps and 40\)",
    ),
    "budget": (
        lambda: of_seed_3(budget=Budget("compute", {"none": 1.0, "refalign": 2.0}, {})),
        r"one is at equal steps, one at equal compute",
    ),
    "numbers": (
        lambda: with_flow(0.4),
        r"none with seed 2 has other numbers \(val/flow was 0\.\d+, is 0\.4\)",
    ),
    "curve": (
        lambda: changed(recipe_comparison(seeds=(2, 3)), curves={"loss/flow": ((1, 0.1),)}),
        r"none with seed 2 has other numbers \(loss/flow at step 1 was",
    ),
    "blocks": (
        lambda: recipe_comparison(("none", "repa"), blocks=(5,)),
        r"eval\.blocks: no block was measured in all comparisons .*folder-1: 5\)",
    ),
    "diverged": (
        lambda: changed(recipe_comparison(seeds=(2, 3)), diverged=True),
        r"none with seed 2 has other numbers \(diverged was False, is True\)",
    ),
    "no variant": (
        lambda: of_seed_3(recipe="name: x\nvariants: {none: {}}\n"),
        r"folder-1: its recipe cannot be read by this version.*it has no variant 'refalign'",
    ),
    "from a sweep": (
        lambda: of_seed_3(recipe=from_a_sweep()),
        r"folder-1: variant refalign comes from a sweep, and its run folders",
    ),
    "baseline": (
        lambda: of_seed_3("baseline=refalign"),
        r"folder-0 has the baseline none and folder-1 has refalign: say which by --baseline",
    ),
    "tuned": (tuned, r"tuning\.trials: variants are tuned differently \(refalign: 0, repa: 7\)"),
    "no recipe": (
        lambda: of_seed_3(recipe="name: x\n"),
        r"folder-1: its recipe cannot be read by this version.*it has no variants",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_was_not_measured_alike_is_refused(what: str) -> None:
    other, message = OTHERS[what]
    with pytest.raises(UserError, match=message):
        merge_of(recipe_comparison(), other())


def test_refusals_hold_between_any_two() -> None:
    """The first comparison has neither of the two that differ."""
    weight = "variants.refalign.objectives.ra.weight=0.25"
    with pytest.raises(UserError, match=r"^folder-1 and folder-2: variant refalign"):
        merge_of(
            recipe_comparison(("none", "repa")),
            recipe_comparison(),
            recipe_comparison(overrides=(weight,)),
        )


def test_another_baseline_may_be_said() -> None:
    other = recipe_comparison(seeds=(3,), overrides=("baseline=refalign",))
    found = merge_of(recipe_comparison(), other, baseline="refalign")
    assert found.baseline == "refalign" and found.seeds == (0, 1, 2, 3)
    with pytest.raises(UserError, match="no variant 'x'; there are none, refalign"):
        merge_of(recipe_comparison(), other, baseline="x")


def test_other_machines_are_told_and_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    other = recipe_comparison(
        seeds=(3,), environment={"torch": "2.14.0", "device": "cpu", "threads": "1"}
    )
    found = merge_of(recipe_comparison(), other)
    assert "torch: comparisons were made with 2.13.0 and with 2.14.0" in caplog.text
    assert "device" not in caplog.text
    assert found.environment == {"torch": "2.13.0, 2.14.0", "device": "cpu", "threads": "1"}


def test_only_blocks_that_all_have_measured_are_left(caplog: pytest.LogCaptureFixture) -> None:
    found = merge_of(
        recipe_comparison(blocks=(0, 1, 3)), recipe_comparison(("none", "repa"), blocks=(1, 3, 5))
    )
    assert "blocks 0, 5 were not measured in all comparisons" in caplog.text
    for run in found.results:
        cosines = {n: v for n, v in run.metrics.items() if n.startswith("cross_cos")}
        assert cosines.keys() == {"cross_cos/block1", "cross_cos/block3", "cross_cos/mean"}
        both = cosines["cross_cos/block1"] + cosines["cross_cos/block3"]
        assert cosines["cross_cos/mean"] == pytest.approx(both / 2)


def test_what_a_sweep_gave_is_read_from_the_runs(tmp_path: Path) -> None:
    comparisons = [recipe_comparison(seeds=(seed,), recipe=from_a_sweep()) for seed in (0, 1, 2)]
    sources = [(written(one, tmp_path / str(i)), one) for i, one in enumerate(comparisons)]
    for (folder, one), weight in zip(sources, (0.5, 0.5, 0.25), strict=True):
        run = next(run for run in one.results if run.variant == "refalign")
        change = f"variants.refalign.objectives.ra.weight={weight}"
        config = load_compare("demo", [change]).run("refalign", run.seed)
        (folder / run.run_dir).mkdir(parents=True)
        (folder / run.run_dir / "recipe.yaml").write_text(dump(config))
    found = merged(sources[:2], tmp_path / "out")
    assert found.seeds == (0, 1)
    assert found.differing["objectives.ra.weight"]["refalign"] == 0.5
    with pytest.raises(UserError, match=r"variant refalign has other settings \(objectives.ra.wei"):
        merged(sources, tmp_path / "out")


def test_metrics_of_blocks_that_one_has_not_measured_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = merge_of(recipe_comparison(), recipe_comparison(seeds=(3,), blocks=()))
    assert "folder-1: no block was measured: metrics of blocks are left out" in caplog.text
    assert not [name for run in found.results for name in run.metrics if "cross_cos" in name]
    assert len([run for run in found.results if "val/flow" in run.metrics]) == 8


def test_a_second_training_is_no_variant_of_another() -> None:
    again = dataclasses.replace(recipe_comparison().results[0], variant="repa")
    with pytest.raises(UserError, match=r"^repa is the second training of a baseline in one"):
        merge_of(recipe_comparison(again=(again,)), recipe_comparison(("none", "repa")))


def test_another_baseline_has_its_own_budget_and_tuning() -> None:
    def budget() -> Budget:
        return Budget("compute", {"none": 1.0, "refalign": 1.25}, {"none": 80, "refalign": 64})

    parts = [recipe_comparison(seeds=(seed,), budget=budget()) for seed in (0, 1)]
    merged_whole = merge_of(*parts, baseline="refalign")
    found = subset(merged_whole, baseline="refalign")
    assert found.budget == subset(parts[0], baseline="refalign").budget
    assert found.budget is not None and found.budget.ratios == {"none": 0.8, "refalign": 1.0}
    both = [
        dataclasses.replace(tuned(), seeds=(s,), results=tuned().results[2 * s : 2 * s + 2])
        for s in (0, 1)
    ]
    assert subset(merge_of(*both, baseline="repa"), baseline="repa").baseline == "repa"


def cost(**slower: float) -> Cost:
    variants = {
        v: VariantCost(0.1 * ratio, Ratio(ratio, 0.9 * ratio, 1.1 * ratio), 100, None, 5)
        for v, ratio in slower.items()
    }
    return Cost(10, 4, 0, "cpu", 0.01, variants)


def test_costs_are_of_the_baseline_of_the_first() -> None:
    other = cost(none=1.0, repa=1.5)
    twice = {
        v: dataclasses.replace(one, seconds=2 * one.seconds) for v, one in other.variants.items()
    }
    found = merge_of(
        recipe_comparison(cost=cost(none=1.0, refalign=2.0)),
        recipe_comparison(("none", "repa"), cost=dataclasses.replace(other, variants=twice)),
    )
    assert found.cost is not None
    seconds = {v: one.seconds for v, one in found.cost.variants.items()}
    assert seconds == pytest.approx({"none": 0.1, "refalign": 0.2, "repa": 0.15})


def test_costs_that_were_not_measured_alike_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    other = dataclasses.replace(cost(none=1.0, repa=1.5), device="gpu")
    found = merge_of(
        recipe_comparison(cost=cost(none=1.0, refalign=2.0)),
        recipe_comparison(("none", "repa"), cost=other),
    )
    assert found.cost is None and "cost of a step was not measured alike" in caplog.text


def test_budgets_of_one_kind_are_merged() -> None:
    def budget(**ratios: float) -> Budget:
        return Budget("compute", ratios, {v: round(80 / r) for v, r in ratios.items()})

    found = merge_of(
        recipe_comparison(budget=budget(none=1.0, refalign=2.0)),
        recipe_comparison(("none", "repa"), budget=budget(none=1.0, repa=1.6)),
    )
    assert found.budget == budget(none=1.0, refalign=2.0, repa=1.6)


def record(folder: Path, run: RunResult, digest: str) -> None:
    path = folder / run.run_dir / "inputs.json"
    path.parent.mkdir(parents=True)
    entry = {
        "name": "data",
        "source": "x",
        "digest": digest,
        "num_files": 1,
        "files": {"a": digest},
    }
    write_json(path, {"version": 1, "fixed": True, "inputs": [entry]})


def test_runs_that_read_other_files_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [written(recipe_comparison(seeds=(seed,)), tmp_path / str(seed)) for seed in range(3)]
    for place, digest in enumerate(["a" * 64, "a" * 64, "b" * 64]):
        for run in recipe_comparison(seeds=(place,)).results:
            record(folders[place], run, digest)
    with caplog.at_level(logging.WARNING):
        assert len(chosen(folders[:2], tmp_path / "out", Choice()).results) == 4
    assert "is not known" not in caplog.text
    with pytest.raises(UserError, match=r"read different data \(a\): they cannot be merged"):
        chosen(folders, tmp_path / "out", Choice())
