"""What a plan counts of sweeps, tuning, budgets, Stage 1, and variants that differ in data."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.plan import fits
from alignlab.experiments.plan.comparison import RecipePlan, plan_recipe
from alignlab.experiments.plan.recipe_runs import RecipeRuns, recipe_runs
from alignlab.experiments.plan.table import as_json, plan_lines, plan_tables
from alignlab.plan.architecture import Architectures
from alignlab.recipe import load_run
from alignlab.units import GIB
from remembered_plans import plan_run

pytestmark = pytest.mark.usefixtures("remembered_plans")

SWEEP = """
seeds: [0, 1]
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0}
  objectives.ra.gate: {kind: categorical, choices: [none, t^1]}
  objectives.ra.blocks: {kind: blocks, choose: range, last: 2, max_size: 2}
  optim.batch_size: {kind: int, low: 2, high: 4, step: 2}
sampler: {name: tpe}
metric: val/flow
trials: 5
"""
VARIANTS = """
baseline: none
seeds: [0, 1]
cost: {rounds: 6}
variants:
  ra: {}
  none: {objectives: {}}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(recipe_file: Path, tmp_path: Path) -> Write:
    """`write(text)` adds to the recipe of the tiny run."""

    def written(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe_file.read_text() + text)
        return path

    return written


def plan_of(runs: RecipeRuns, gpus: int | None = None) -> RecipePlan:
    with ExitStack() as stack:
        return plan_recipe(runs, Architectures(stack), gpus=gpus)


def shown(plan: RecipePlan, memory: int = 80 * GIB) -> list[list[str]]:
    return [row for _, _, rows in plan_tables(plan, memory, []) for row in rows]


def test_a_sweep_costs_its_trials_and_needs_the_memory_of_its_largest(write: Write) -> None:
    plan = plan_of(recipe_runs(write(SWEEP), []))
    one, *values = plan.variants
    assert one == "run" and values == ["objectives.ra.blocks=[1, 2]", "optim.batch_size=4"]
    base, blocks, batch = plan.variants.values()
    assert (base.runs, blocks.runs, batch.runs) == (10, 0, 0)
    assert plan.hours == pytest.approx(10 * base.hours + plan.encoding_hours)
    assert plan.highest is batch and batch.plan.peak.total > base.plan.peak.total
    assert plan.days[64] * 24 == pytest.approx(base.hours + plan.encoding_hours / 64)
    assert plan.encodings[0].clips == 6  # as the data set has: trials draw the same
    assert plan.runs.sizes == "5 trials x 2"
    assert ["optim.batch_size=4", "memory alone"] in [[row[0], row[-1]] for row in shown(plan)]
    assert any("as written" in line for line in plan_lines(plan, 80 * GIB, []))


def test_a_grid_has_a_trial_for_each_point(write: Write) -> None:
    text = SWEEP.replace("{name: tpe}", "{name: grid}").replace("trials: 5\n", "")
    text = text.replace("  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0}\n", "")
    runs = recipe_runs(write(text), [])
    assert sum(runs.counts.values()) == 2 * (2 * 5 * 2)  # gates, ranges of blocks, batches


def test_a_space_that_no_run_could_take_is_refused_as_by_the_sweep(write: Write) -> None:
    with pytest.raises(UserError, match=r"^space\.optim\.nothing: "):
        recipe_runs(write(SWEEP.replace("optim.batch_size", "optim.nothing")), [])


def test_trials_that_tune_variants_are_counted(write: Write) -> None:
    text = VARIANTS + "tune: {trials: 3, seeds: [7], steps: 1}\n"
    plan = plan_of(recipe_runs(write(text), []))
    assert {name: v.trial_runs for name, v in plan.variants.items()} == {"ra": 3, "none": 3}
    for variant in plan.variants.values():  # runs have two steps
        assert variant.trial_hours == pytest.approx(variant.hours / 2)
    each = sum(v.hours for v in plan.variants.values())
    assert plan.hours == pytest.approx(each * (2 + 3 / 2) + plan.encoding_hours)
    assert plan.runs.sizes == "2 x 2 and 6 of trials"


def test_a_budget_gives_every_variant_the_baselines_cost(write: Write) -> None:
    equal, steps = (
        plan_of(recipe_runs(write(VARIANTS + budget), [])) for budget in ("budget: compute\n", "")
    )
    assert equal.variants["ra"].hours == equal.variants["none"].hours
    assert equal.variants["none"].hours == steps.variants["none"].hours < steps.variants["ra"].hours
    assert any(note.startswith("budget: compute: every run") for note in equal.notes)


def test_variants_on_other_data_are_encoded_apart(write: Write) -> None:
    text = VARIANTS.replace("none: {objectives: {}}", "none: {data.train_clips: 3, steps: 9}")
    plan = plan_of(recipe_runs(write(text), []))
    assert [one.clips for one in plan.encodings] == [6, 3]
    both = [one.clips * one.bytes_per_clip for one in plan.encodings]
    assert plan.cache_bytes == sum(both) and min(both) > 0
    assert [row[2] for row in shown(plan) if row[0] == "all of them"] == ["6 clips", "3 clips"]


def test_too_few_gpus_for_a_run_of_a_comparison_are_refused(write: Write) -> None:
    runs = recipe_runs(write(VARIANTS + "launch: {gpus: 2}\n"), [])
    with pytest.raises(UserError, match=r"^1 GPUs train no run of run, which has 2 \(launch"):
        plan_of(runs, gpus=1)


def test_ranks_on_the_cpu_are_said_to_be_planned_as_gpus(write: Write) -> None:
    runs = recipe_runs(write(VARIANTS + "launch: {gpus: 0, ranks: 2}\n"), [])
    assert runs.notes == ("launch.gpus: 0: each rank is planned as if it had a GPU",)


def test_what_compares_samples_is_not_planned_on_several_gpus(recipe_file: Path) -> None:
    objective = "objectives={d: {name: dispersive, blocks: [1]}}"
    config = load_run(recipe_file, [objective, "optim.batch_size=4"])
    with ExitStack() as stack, pytest.raises(UserError, match=r"^objectives\.d: .* which 2 ranks"):
        plan_run(config, Architectures(stack), gpus=2)


def test_copies_that_are_written_beside_the_training_are_in_main_memory(recipe_file: Path) -> None:
    plain, beside = (
        plan_of(recipe_runs(recipe_file, [f"checkpoint.asynchronous={on}"]))
        for on in ("false", "true")
    )
    extra = [row for row in shown(beside) if row not in shown(plain)]
    (row,) = extra
    assert row[0] == "in main memory while a checkpoint is written"
    assert row[1] == next(row[1] for row in shown(plain) if row[0] == "a checkpoint")


def test_samples_are_left_out_where_their_decoding_does_not_fit(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["eval.sample_clips=1", "eval.sample_every=1", "eval.generated_clips=1"]
    config = load_run(recipe_file, settings)
    text, changed = fits._without_samples(config)
    assert text == "eval.sample_clips=0 eval.generated_clips=0 eval.sample_every=null"
    assert text in dict(fits._candidates(config, 1))
    typed = load_run(recipe_file, [*settings, *text.split()])
    assert RunConfig.model_validate(changed(config).model_dump()) == typed
    with ExitStack() as stack:
        architectures = Architectures(stack)
        names = [
            {phase.name for phase in plan_run(one, architectures).phases} for one in (config, typed)
        ]
    assert names[0] - names[1] == {"decoding of samples"}


@pytest.mark.parametrize("kind", ["sara", "moalign"])
def test_a_stage1_training_is_planned(kind: str) -> None:
    result = CliRunner().invoke(app, ["plan", f"stage1_{kind}", "--memory", "1"])
    assert result.exit_code == 0, result.output
    assert f"stage1_{kind}, Stage 1, 1,{5 if kind == 'moalign' else 0}00 steps" in result.output
    assert "Stage 1 network" in result.output and "2 entities" in result.output
    assert "optim.batch_size=1" in result.output  # which is tried where it does not fit
    assert "does not fit into 1 GiB, nor with all of these changes" in result.output


def test_a_stage1_training_has_no_more_gpus() -> None:
    runs = recipe_runs("stage1_moalign", [])
    plan = plan_of(runs)
    assert list(plan.days) == [1] and as_json(plan, GIB, [])["kind"] == "stage1"
    with pytest.raises(UserError, match="2 GPUs do not share it"):
        plan_of(runs, gpus=2)
