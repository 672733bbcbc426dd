"""Equal wall time or compute: steps are decided once, from the measured cost of a step."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.compare import budget as budget_module
from alignlab.experiments.compare.budget import decide_budget, with_budget
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.compare.result import Comparison, Cost, Ratio, VariantCost
from alignlab.experiments.compare.run import compare
from alignlab.experiments.launchers import local
from alignlab.runs.metric_rows import read_rows
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

Make = Callable[..., CompareConfig]

VARIANTS = """
baseline: none
seeds: [0]
cost: {rounds: 6}
variants:
  none: {}
  heavy: {optim.batch_size: 6}
  other: {optim.lr: 1e-4}
"""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "equal.yaml"
    comparison_recipe(recipe_file, path, VARIANTS)
    path.write_text(path.read_text().replace("optim: {", "optim: {schedule: linear, ", 1))
    return path


@pytest.fixture
def make(recipe: Path, tmp_path: Path) -> Make:
    return lambda *overrides: load_compare(recipe, [f"output={tmp_path}", *overrides])


def cost(**ratios: float) -> Cost:
    variants = {
        v: VariantCost(ratio, Ratio(ratio, ratio, ratio), int(1e9 * ratio**2), None, 1)
        for v, ratio in ratios.items()
    }
    return Cost(6, 4, 0, "cpu", 0.0, variants)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`measured(none=1.0, heavy=2.5)`: what every measurement from now on finds."""

    def says(**ratios: float) -> None:
        monkeypatch.setattr(budget_module, "cost_of", lambda *_: cost(**ratios))

    return says


def test_a_comparison_of_equal_compute(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compare(make("budget=compute", "steps=6"))
    found = Comparison.load(report.parent / "comparison.json")
    assert found.budget is not None and found.cost is not None
    flops = {v: one.flops for v, one in found.cost.variants.items()}
    steps = {run.variant: run.steps for run in found.results}
    assert steps == found.budget.steps
    assert steps["none"] == steps["other"] == 6 and steps["heavy"] == 2
    assert flops["heavy"] * steps["heavy"] == pytest.approx(flops["none"] * 6, rel=0.2)
    assert found.differing["steps"] == steps
    # the learning rate falls to its end within each variant's own steps
    for run in found.results:
        rows = read_rows(report.parent / run.run_dir / "metrics.jsonl")
        rates = [row["lr"] for row in rows if "lr" in row]
        top = 1e-4 if run.variant == "other" else 1e-3
        assert rates[-1] == pytest.approx(top / run.steps)
    assert "Equal compute: steps none 6 (1.000), heavy 2 (3." in report.read_text()
    assert "heavy 2 (3." in (report.parent / "report.md").read_text()

    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(local, "train", no_training)
    monkeypatch.setattr("alignlab.experiments.compare.cost.measure_cost", no_training)
    again = Comparison.load(compare(make("budget=compute", "steps=6")).with_name("comparison.json"))
    assert (again.budget, again.results) == (found.budget, found.results)


def test_an_idle_objective_is_refused_before_the_cost_is_measured(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_measurement(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(budget_module, "cost_of", no_measurement)
    idle = "objectives.ra={name: refalign, teacher: dino, blocks: [0]}"
    config = make(
        "budget=compute",
        "data.references=[0,0]",
        f"variants.heavy={{{idle.replace('=', ': ', 1)}}}",
    )
    with pytest.raises(UserError, match=r"leaves objectives\.ra nothing to align"):
        compare(config)
    assert not list(tmp_path.iterdir())


def test_wall_time_is_decided_once(
    make: Make, tmp_path: Path, measured: Callable[..., None]
) -> None:
    config = make("budget=wall_time", "steps=100")
    measured(none=1.0, heavy=2.5, other=0.98)
    budget = decide_budget(config, tmp_path)
    assert budget is not None and budget.steps == {"none": 100, "heavy": 40, "other": 102}
    assert with_budget(config, budget).run("heavy", 3).steps == 40
    measured(none=1.0, heavy=9.0, other=9.0)
    assert decide_budget(config, tmp_path) == budget
    assert decide_budget(make("budget=wall_time", "steps=100", "seeds=[4,0]"), tmp_path) == budget


def test_a_new_variant_is_added(make: Make, tmp_path: Path, measured: Callable[..., None]) -> None:
    measured(none=1.0, heavy=2.5, other=1.0)
    first = decide_budget(make("budget=wall_time", "steps=100"), tmp_path)
    measured(none=1.0, heavy=9.0, other=9.0, new=2.0)
    more = ["budget=wall_time", "steps=100", "variants.new={optim: {lr: 1e-2}}"]
    second = decide_budget(make(*more), tmp_path)
    assert first is not None and second is not None
    assert second.steps == first.steps | {"new": 50}
    # one that is left out for a while keeps its steps too
    assert decide_budget(make("budget=wall_time", "steps=100"), tmp_path) == second


def test_the_steps_of_the_shortest_variant(
    make: Make, tmp_path: Path, measured: Callable[..., None]
) -> None:
    measured(none=1.0, heavy=50.0, other=1.0)
    budget = decide_budget(make("budget=wall_time", "steps=2"), tmp_path)
    assert budget is not None and budget.steps["heavy"] == 1


def test_more_steps_are_dealt_at_the_ratios_that_were_measured(
    make: Make, tmp_path: Path, measured: Callable[..., None]
) -> None:
    measured(none=1.0, heavy=2.0, other=1.0)
    decide_budget(make("budget=wall_time", "steps=10"), tmp_path)
    measured(none=1.0, heavy=5.0, other=5.0)
    before = (tmp_path / "budget.json").read_text()
    found = decide_budget(make("budget=wall_time", "steps=20"), tmp_path)
    assert found is not None and found.steps == {"none": 20, "heavy": 10, "other": 20}
    # until the runs go on, the old number of steps can be asked for
    assert (tmp_path / "budget.json").read_text() == before
    added = make("budget=wall_time", "steps=20", "variants.late={optim.lr: 2e-4}")
    measured(none=1.0, heavy=5.0, other=5.0, late=4.0)
    budget = decide_budget(added, tmp_path)
    assert budget is not None and budget.steps["late"] == 5 and budget.steps["heavy"] == 10


@pytest.mark.parametrize(
    "changed",
    [
        ["budget=compute"],
        ["budget=steps"],
        ["budget=wall_time", "variants.heavy.optim.batch_size=4"],
        ["budget=wall_time", "baseline=other"],
        ["budget=wall_time", "steps=1"],
    ],
)
def test_the_budget_of_another_recipe_is_refused(
    make: Make, tmp_path: Path, measured: Callable[..., None], changed: list[str]
) -> None:
    measured(none=1.0, heavy=2.5, other=1.0)
    decide_budget(make("budget=wall_time"), tmp_path)
    run = tmp_path / "none" / "seed-0"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"budget\.json was decided for another recipe") as caught:
        decide_budget(make(*changed), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_budget_of_which_no_run_kept_a_step_is_decided_anew(
    make: Make, tmp_path: Path, measured: Callable[..., None]
) -> None:
    measured(none=1.0, heavy=2.5, other=1.0)
    decide_budget(make("budget=wall_time"), tmp_path)
    (tmp_path / "none" / "seed-0").mkdir(parents=True)
    (tmp_path / "none" / "seed-0" / "recipe.yaml").touch()
    budget = decide_budget(make("budget=wall_time", "steps=50"), tmp_path)
    assert budget is not None and budget.steps["none"] == 50
    assert decide_budget(make("budget=steps"), tmp_path) is None
    assert not (tmp_path / "budget.json").exists()


OBJECTIVE = "variants.other={objectives: {ra: {name: refalign, teacher: dino, blocks: [0], %s}}}"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("variants.heavy.steps=7", r"variants\.heavy\.steps: nothing reads it with budget: comp"),
        (
            OBJECTIVE % "schedule: {kind: stop_at, step: 1}",
            r"other\.objectives\.ra\.schedule: stop",
        ),
        (OBJECTIVE % "schedule: {kind: stop_at_plateau}", r"schedule: stop_at_plateau turns the"),
        (OBJECTIVE % "schedule: {kind: linear, end: 1}", r"schedule: linear turns the objective"),
    ],
)
def test_a_step_that_does_not_always_cost_the_same_is_refused(
    make: Make, tmp_path: Path, measured: Callable[..., None], override: str, named: str
) -> None:
    measured(none=1.0, heavy=2.5, other=1.0)
    with pytest.raises(UserError, match=named):
        decide_budget(make("budget=compute", override), tmp_path)
    decide_budget(make("budget=compute", OBJECTIVE % "schedule: linear"), tmp_path)


def test_a_schedule_that_ends_within_the_longer_run_is_refused(
    make: Make, tmp_path: Path, measured: Callable[..., None]
) -> None:
    measured(none=1.0, heavy=1.0, other=0.25)  # four times the steps of the baseline
    steps = make("budget=compute").runs["none"].steps
    late = make("budget=compute", OBJECTIVE % f"schedule: {{kind: stop_at, step: {2 * steps}}}")
    with pytest.raises(UserError, match=r"schedule: stop_at turns the"):
        decide_budget(late, tmp_path)
    assert not (tmp_path / "budget.json").exists()


def test_what_cannot_be_measured_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"cost: budget: compute is set from it; remove cost: null"):
        make("budget=compute", "cost=null")
    with pytest.raises(UserError, match=r"budget: unknown value 'time'.* valid: steps, wall_time"):
        make("budget=time")
    monkeypatch.setattr(budget_module, "cost_of", lambda *_: None)
    with pytest.raises(UserError, match="budget: wall_time needs the cost of a step"):
        decide_budget(make("budget=wall_time"), tmp_path)
    blind = dataclasses.replace(cost(none=1.0, heavy=1.0, other=1.0), unknown=("x.flash",))
    monkeypatch.setattr(budget_module, "cost_of", lambda *_: blind)
    with pytest.raises(UserError, match=r"no formula for x\.flash; set model\.attention=native"):
        decide_budget(make("budget=compute"), tmp_path)
    assert decide_budget(make("budget=wall_time"), tmp_path) is not None


def test_equal_steps_need_no_decision(make: Make, tmp_path: Path) -> None:
    assert decide_budget(make(), tmp_path) is None
    assert not (tmp_path / "budget.json").exists()
    config = make()
    assert with_budget(config, None) is config


def test_a_damaged_file_is_named(make: Make, tmp_path: Path, measured: Callable[..., None]) -> None:
    measured(none=1.0, heavy=2.5, other=1.0)
    (tmp_path / "budget.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(UserError, match=r"budget\.json is damaged"):
        decide_budget(make("budget=compute"), tmp_path)
