"""The committed plans of the shipped recipes, and the table of them in docs/scale.md."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import UserError
from alignlab.experiments.plan.comparison import recipe_runs
from alignlab.experiments.plan.page import BEGIN, END, gpus_of, planned_recipes, plans, table

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "experiments/results/plans.json").read_text())
    return found


def test_committed_plans_are_of_the_shipped_recipes(committed: dict[str, Any]) -> None:
    """If it fails: `python -m alignlab.experiments.plan.page RECIPE`, or without a name for all."""
    assert sorted(committed) == sorted(planned_recipes())
    for name, plan in committed.items():
        if "refused" in plan:
            with pytest.raises(UserError):
                recipe_runs(name, [])
            continue
        runs = recipe_runs(name, [])
        assert (name, plan["seeds"], plan["variants"].keys()) == (
            name,
            runs.seeds,
            runs.variants.keys(),
        )
        for variant, config in runs.variants.items():
            one = plan["variants"][variant]
            share = one["samples"] * one["micro_batches"] * one["gpus"]
            assert (one["steps"], share) == (config.steps, config.optim.batch_size)
            assert one["micro_batches"] == config.optim.accumulate
            assert one["gpus"] == max(runs.ranks, gpus_of(name))


def test_the_documented_table_is_the_committed_one(committed: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    assert page.split(BEGIN)[1].split(END)[0].strip() == table(committed)


def test_one_recipe_without_a_plan_leaves_the_others_theirs() -> None:
    found = plans(["tuned_refalign", "overhead"])
    assert found["tuned_refalign"]["refused"].startswith("variants.refalign-tuned.from: ")
    shown = table(found)
    assert "| `overhead` | 1 x 1 | 1 | 2.3 M |" in shown
    assert "`tuned_refalign` has no plan: variants.refalign-tuned.from: " in shown
