"""`alignlab plan`: against what a run really writes, where it fits, what is refused."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.plan.comparison import RecipePlan, RecipeRuns, plan_recipe, recipe_runs
from alignlab.experiments.plan.fits import cards_when_sharded, changes_to_fit
from alignlab.experiments.plan.rates import Rates
from alignlab.plan.architecture import Architectures, shipped
from alignlab.plan.fake_models import fake_wan
from alignlab.plan.fake_values import fake_values
from alignlab.plan.run_plan import AGAIN, FORWARD, RunPlan, plan_run
from alignlab.recipe import load_run
from alignlab.runs.checkpoint_folders import step_folders

COMPARISON = """
baseline: none
seeds: [0, 1]
variants:
  none: {objectives: {}}
  ra: {}
  again: {objectives.ra.weight: 0.5}
"""


def plan_of(runs: RecipeRuns, **settings: Any) -> RecipePlan:
    with ExitStack() as stack:
        return plan_recipe(runs, Architectures(stack), **settings)


def as_json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def one(recipe_file: Path) -> dict[str, Any]:
    """The plan of the tiny run, whose cache keeps texts, latents and features."""
    return as_json(str(recipe_file), "data.references=[3,3]")


def test_a_checkpoint_has_the_planned_size(one: dict[str, Any], full_run: Path) -> None:
    planned = one["variants"]["run"]["checkpoint"]
    newest = step_folders(full_run / "checkpoints")[-1]
    sizes = {path.name: path.stat().st_size for path in newest.rglob("*.safetensors")}
    assert planned["one"] == pytest.approx(sum(sizes.values()), rel=0.05)
    assert planned["optimizer"] == pytest.approx(sizes["optimizer.safetensors"], rel=0.05)


def test_the_plan_of_a_run(one: dict[str, Any]) -> None:
    run = one["variants"]["run"]
    assert one["fits"] and one["changes"] == []
    assert run["trained"] == run["parameters"] + run["projectors"]
    assert run["peak"] == max(sum(parts.values()) for parts in run["memory"].values())
    assert AGAIN not in run["step_flops"] and run["step_flops"][FORWARD] > 0
    # what is kept is computed once a clip, and read at every step
    assert {"autoencoder", "text encoder", "teachers"} <= run["clip_flops"].keys()
    assert one["clips"] == 4 and one["clips_are_known"]  # of six, as many as are drawn
    assert one["cache"] == 4 * (sum(run["clip_bytes"].values()) - run["clip_bytes"]["pixels"])


def test_without_a_cache_encoders_are_part_of_every_step(recipe_file: Path) -> None:
    runs = recipe_runs(recipe_file, ["data.references=[3,3]", "data.cache.mode=off"])
    plan = plan_of(runs).highest.plan
    assert plan.clip_flops == {} and sum(plan.clip.cached.values()) == 0
    assert plan.step_flops["autoencoder"] == 2 * (
        plan.encoders.clip.flops + 3 * plan.encoders.reference.flops
    )
    assert plan.step_flops["teachers"] == 2 * sum(teacher.flops for teacher in plan.step.teachers)
    step = next(phase for phase in plan.phases if phase.name == "step")
    assert {"text encoder", "autoencoder", "teachers"} <= step.parts.keys()


def test_a_comparison_is_the_sum_of_its_runs(recipe_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(recipe_file.read_text() + COMPARISON)
    plan = plan_of(recipe_runs(path, []), rates=Rates(100.0), gpus=3)
    hours = {name: variant.hours for name, variant in plan.variants.items()}
    assert plan.hours == pytest.approx(2 * sum(hours.values()) + plan.encoding_hours)
    assert hours["ra"] > hours["none"]
    one = plan.variants["ra"]
    tera = sum(one.plan.step_flops.values()) / 1e12
    assert hours["ra"] == pytest.approx(one.config.steps * tera / 20.0 / 3600)  # fp32: a fifth
    # six runs on six GPUs, and no more than that
    assert plan.days[8] * 24 == pytest.approx(max(hours.values()) + plan.encoding_hours / 8)
    assert plan.days[1] * 24 == pytest.approx(plan.hours)


def test_what_to_change_first_where_it_does_not_fit(recipe_file: Path) -> None:
    config = load_run(recipe_file, ["data.references=[2,2]", "optim.batch_size=4"])
    with ExitStack() as stack:
        architectures = Architectures(stack)
        plan = plan_run(config, architectures)
        assert changes_to_fit(config, plan, architectures, plan.peak.total) == []
        (first,) = changes_to_fit(config, plan, architectures, plan.peak.total - 1)
        changed = config.model_copy(
            update={"model": config.model.model_copy(update={"gradient_checkpointing": True})}
        )
        after = plan_run(changed, architectures)
    assert first.settings == "model.gradient_checkpointing=true" and first.fits
    assert first.peak == after.peak.total < plan.peak.total
    assert cards_when_sharded(plan, plan.blocks, plan.peak.total) == 1
    assert cards_when_sharded(plan, plan.blocks, plan.peak.total - 1) == 2


def test_memory_too_small_is_said(recipe_file: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(recipe_file), "--memory", "1"])
    assert result.exit_code == 0
    assert "does not fit into 1 GiB" in result.output  # the context alone takes it


def test_more_gpus_share_a_step(recipe_file: Path) -> None:
    config = load_run(recipe_file, ["optim.batch_size=4"])
    with ExitStack() as stack:
        one, two = (plan_run(config, Architectures(stack), gpus=gpus) for gpus in (1, 2))
        with pytest.raises(UserError, match=r"^optim.batch_size: 4 is no multiple of .* 1 x 3"):
            plan_run(config, Architectures(stack), gpus=3)
    assert (one.samples, two.samples) == (4, 2)
    assert two.step_flops[FORWARD] == one.step_flops[FORWARD]
    assert any(phase.name == "averaging" for phase in two.phases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep_refalign"], "sweep_refalign is a sweep: `alignlab plan` reads runs"),
        (["stage1_sara"], "stage1_sara is a Stage 1 training: `alignlab plan` reads runs"),
        (["tiny", "model.path=nobody/nothing"], "model.path: nobody/nothing: a plan needs its"),
        (["tiny", "teachers.dino.path=nobody/nothing"], "teachers.dino.path: nobody/nothing: a"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan_of(recipe_runs(arguments[0], arguments[1:]))
    assert str(error.value).startswith(message)


# docs/scale.md: what diffusers' classes have of these settings
PARAMETERS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 4_999_787_712,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14_288_491_584,
}


@pytest.mark.parametrize("source", shipped()["pipelines"])
def test_architectures_that_alignlab_ships(source: str, recipe_file: Path) -> None:
    expert = ["model.expert=high"] if "A14B" in source else []
    config: RunConfig = load_run(recipe_file, [f"model.path={source}", *expert])
    with ExitStack() as stack, fake_values():
        architectures = Architectures(stack)
        transformer = fake_wan(config, architectures.pipeline(source)).transformer
    assert sum(p.numel() for p in transformer.parameters()) == PARAMETERS[source]
    assert architectures.notes == [
        f"{source}: architecture as shipped with alignlab, not read from the hub"
    ]


def test_a_gpu_holds_its_shards_and_no_state_that_is_offloaded(recipe_file: Path) -> None:
    with ExitStack() as stack:
        architectures = Architectures(stack)
        whole, shards, offloaded = (
            plan_run(load_run(recipe_file, ["optim.batch_size=4", *more]), architectures, gpus=2)
            for more in ([], ["model.shard=fsdp2"], ["optim.offload=true"])
        )

    def standing(plan: RunPlan, part: str) -> int:
        return next(p.parts for p in plan.phases if p.name == "averaging").get(part, 0)

    for part in ("weights", "gradients", "optimizer state"):
        assert standing(shards, part) == standing(whole, part) // 2 > 0
    assert standing(shards, "gathered blocks") > 0 == standing(whole, "gathered blocks")
    assert cards_when_sharded(shards, shards.blocks, shards.peak.total) == 2
    assert cards_when_sharded(shards, shards.blocks, shards.peak.total - 1) is None
    assert standing(offloaded, "optimizer state") == 0 < standing(offloaded, "weights")


def test_replicas_divide_a_model_by_the_gpus_that_share_one(recipe_file: Path) -> None:
    with ExitStack() as stack:
        architectures = Architectures(stack)
        two, four, replicas = (
            plan_run(load_run(recipe_file, settings), architectures, gpus=gpus)
            for gpus, settings in (
                (2, ["model.shard=fsdp2", "optim.batch_size=4"]),
                (4, ["model.shard=fsdp2", "optim.batch_size=8"]),
                (4, ["model.shard=fsdp2", "model.replicate=2", "optim.batch_size=8"]),
            )
        )
    assert replicas.phases == two.phases != four.phases
    assert replicas.is_sharded
