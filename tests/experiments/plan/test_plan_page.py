"""The committed plans of the shipped recipes, and the table of them in docs/scale.md."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.recipe_file import recipe_folder, shipped_recipes
from alignlab.errors import UserError
from alignlab.experiments.plan.page import BEGIN, END, NEED_OTHERS, gpus_of, plans, table
from alignlab.experiments.plan.recipe_runs import recipe_runs
from alignlab.units import GIB

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "experiments/results/plans.json").read_text())
    return found


def test_committed_plans_are_of_the_shipped_recipes(committed: dict[str, Any]) -> None:
    """If it fails: `python -m alignlab.experiments.plan.page RECIPE`, or without a name for all."""
    assert sorted(committed) == sorted(shipped_recipes())
    for name, plan in committed.items():
        try:
            runs = recipe_runs(name, [])
        except UserError:  # what another training leaves is not here
            assert name in NEED_OTHERS
            continue
        assert (plan["sizes"], plan["kind"]) == (runs.sizes, runs.kind), name
        assert plan["variants"].keys() == runs.variants.keys(), name
        for variant, config in runs.variants.items():
            one = plan["variants"][variant]
            share = one["samples"] * one["micro_batches"] * one["gpus"]
            assert (one["steps"], share) == (config.steps, config.optim.batch_size), name
            assert one["micro_batches"] == getattr(config.optim, "accumulate", 1)
            assert one["gpus"] == max(runs.ranks, gpus_of(name) or 1)


def test_every_shipped_recipe_has_a_plan_and_fits_into_80_gib(committed: dict[str, Any]) -> None:
    assert [name for name, plan in committed.items() if not plan.get("fits")] == []


WAN = [name for name in shipped_recipes() if name.startswith("wan2")]


@pytest.mark.parametrize("name", WAN)
def test_recipes_of_real_size_fit_the_cards_that_they_name(
    name: str, committed: dict[str, Any]
) -> None:
    plan = committed[name]
    assert plan["fits"] and plan["memory"] == 80 * GIB
    head = (recipe_folder() / f"{name}.yaml").read_text().split("\nname:")[0]
    assert plan["gpus"] == (8 if "eight 80 GB GPUs" in head else 1)
    peak = max(one["peak"] for one in plan["variants"].values())
    said = re.search(r"`alignlab plan`: (\d+) GiB", head)
    assert said is None or int(said[1]) == round(peak / GIB)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAN)
def test_committed_plans_are_found_again(name: str, committed: dict[str, Any]) -> None:
    """Twenty seconds each, up to two minutes of the comparison."""
    assert json.loads(json.dumps(plans([name])[name])) == committed[name]


def test_the_documented_table_is_the_committed_one(committed: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    assert page.split(BEGIN)[1].split(END)[0].strip() == table(committed)


def test_one_recipe_without_a_plan_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = plans(["tuned_refalign", "overhead"])
    assert found["tuned_refalign"]["refused"].startswith("variants.refalign-tuned.from: ")
    shown = table(found)
    assert "| `overhead` | 1 x 1 | 1 | 2.3 M |" in shown
    assert "`tuned_refalign` has no plan: variants.refalign-tuned.from: " in shown
