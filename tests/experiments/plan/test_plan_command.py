"""`alignlab plan`: against what a run really writes, where it fits, what is refused."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.config.model import LoraConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.plan import fits
from alignlab.experiments.plan.comparison import RecipePlan, plan_recipe
from alignlab.experiments.plan.fits import changes_to_fit, gpus_in_shards
from alignlab.experiments.plan.rates import Rates
from alignlab.experiments.plan.recipe_runs import RecipeRuns, recipe_runs
from alignlab.plan.architecture import Architectures, shipped
from alignlab.plan.fake_models import fake_wan
from alignlab.plan.fake_values import fake_values
from alignlab.plan.run_plan import AGAIN, FORWARD, RunPlan
from alignlab.plan.sizes import ASIDE, GATHERED, Phase, sharded
from alignlab.recipe import load_run
from alignlab.runs.checkpoint_folders import step_folders
from remembered_plans import plan_run

pytestmark = pytest.mark.usefixtures("remembered_plans")

SHARDS = {"shard": "fsdp2"}
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
    (clips,) = one["clips"]
    assert clips["count"] == 4 and clips["is_known"]  # of six, as many as are drawn
    assert clips["cached"] == sum(run["clip_bytes"].values()) - run["clip_bytes"]["pixels"]
    assert one["cache"] == 4 * clips["cached"]


def test_without_a_cache_encoders_are_part_of_every_step(recipe_file: Path) -> None:
    runs = recipe_runs(recipe_file, ["data.references=[3,3]", "data.cache.mode=off"])
    plan = plan_of(runs).highest.plan
    assert plan.clip_flops == {} and sum(plan.clip.cached.values()) == 0
    assert plan.encoders is not None  # of a run
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


def test_runs_of_a_comparison_on_several_gpus_each(recipe_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(recipe_file.read_text() + COMPARISON + "launch: {gpus: 2}\n")
    runs = recipe_runs(path, ["optim.batch_size=4"])
    plan = plan_of(runs)
    hours = {name: variant.hours for name, variant in plan.variants.items()}
    assert {variant.plan.gpus for variant in plan.variants.values()} == {2}
    assert plan.highest.plan.samples == 2 and min(plan.days) == 2
    # six runs at a time, each of two GPUs
    assert plan.days[16] * 24 == pytest.approx(max(hours.values()) / 2 + plan.encoding_hours / 16)


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
        (shards,) = gpus_in_shards(config, plan, architectures, after.peak.total + 2**20)
    assert first.settings == "model.gradient_checkpointing=true" and first.fits
    assert first.peak == after.peak.total < plan.peak.total
    assert shards.settings == "model.shard=fsdp2 on 2 GPUs" and shards.fits


@pytest.mark.parametrize(
    ("settings", "section", "change"),
    [
        (["objectives={d: {name: dispersive, blocks: [1]}}"], "optim", {"accumulate": 4}),
        (["objectives={s: {name: sra, blocks: [0], deep_blocks: [1]}}"], "model", SHARDS),
        (["optim.name=adamw_8bit"], "model", SHARDS),
        (["model.init=random"], "model", {"train": "lora", "lora": LoraConfig()}),
        (["optim.batch_size=2"], "model", SHARDS),
    ],
)
def test_what_a_run_is_not_trained_with_is_not_planned_as_a_change(
    recipe_file: Path, settings: list[str], section: str, change: dict[str, Any]
) -> None:
    config = load_run(recipe_file, ["objectives={}", "optim.batch_size=4", *settings])
    with ExitStack() as stack:
        architectures = Architectures(stack)
        plan = plan_run(config, architectures)
        changed = fits._set(section, **change)(config)
        gpus = 4 if change is SHARDS else 1
        assert fits._plan(changed, architectures, gpus, plan) is None
        assert fits._plan(config, architectures, 1, plan) is not None


def test_a_run_that_8_bits_do_not_make_fit_is_shared_with_adamws_own_state(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run(recipe_file, ["objectives={}", "optim.batch_size=4", "model.init=random"])
    name = "optim.name=adamw_8bit"
    change = (name, fits._set("optim", name="adamw_8bit"))
    monkeypatch.setattr(fits, "_candidates", lambda config, gpus: iter([change]))
    with ExitStack() as stack:
        architectures = Architectures(stack)
        plan = plan_run(config, architectures)
        (alone,) = fits.changes_to_fit(config, plan, architectures, 1)
        first, last = fits.changes_to_fit(config, plan, architectures, alone.peak - 1)
    assert first == alone and first.settings == name and not first.fits
    assert last.fits and last.peak < alone.peak
    assert last.settings == "model.shard=fsdp2 optim.name=adamw on 2 GPUs"


def test_a_run_for_several_gpus_is_told_to_take_them(recipe_file: Path) -> None:
    settings = ["optim.batch_size=4", "objectives={}", "model.shard=fsdp2"]
    config = load_run(recipe_file, settings)
    with ExitStack() as stack:
        architectures = Architectures(stack)
        plan = plan_run(config, architectures)
        (change,) = changes_to_fit(config, plan, architectures, plan.peak.total - 1)
    assert change.settings == "model.shard=fsdp2 on 2 GPUs" and change.fits


def test_gradients_take_the_bytes_of_their_weights(recipe_file: Path) -> None:
    kahan = ["model.weights=bf16", "optim.name=adamw_bf16_kahan"]
    found = []
    for settings in ([], kahan):
        config = load_run(recipe_file, ["optim.batch_size=4", "model.precision=bf16", *settings])
        with ExitStack() as stack:
            found.append(plan_run(config, Architectures(stack), gpus=2))
    fp32, bf16 = found
    assert fp32.step.gradients == 4 * fp32.step.trained
    assert bf16.step.gradients < 0.7 * fp32.step.gradients
    for plan in found:
        (averaging,) = (phase for phase in plan.phases if phase.name == "averaging")
        assert averaging.parts["gradients"] == plan.step.gradients
        assert averaging.parts["averaging of gradients"] == plan.step.gradients  # one bucket


def test_the_average_of_the_weights_stands_beside_them_while_samples_are_made(
    recipe_file: Path,
) -> None:
    found = []
    for settings in ([], ["optim.ema=0.9"]):
        config = load_run(recipe_file, ["eval.sample_clips=1", *settings])
        with ExitStack() as stack:
            plan = plan_run(config, Architectures(stack))
        (samples,) = (phase for phase in plan.phases if phase.name == "decoding of samples")
        found.append((samples.total, plan.step))
    (plain, _), (averaged, step) = found
    assert averaged - plain == step.gradients + step.standing["moving averages"]


def test_what_variants_read_of_a_clip_is_encoded_once(recipe_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    teachers = "teachers.early: {family: dinov2, path: assets/tiny-dino, feature: 'layer:1'}"
    early = f"  early: {{{teachers}, objectives.ra.teacher: early}}\n"
    path.write_text(recipe_file.read_text() + COMPARISON + early)
    plan = plan_of(recipe_runs(path, []))
    flops = {name: variant.plan.clip_flops for name, variant in plan.variants.items()}
    parts = ("autoencoder", "text encoder")
    both = sum(flops["ra"][part] for part in parts) + flops["ra"]["teachers"]
    assert flops["again"] == flops["ra"]
    both += flops["early"]["teachers"]
    tera = both / 1e12
    clips = plan.encodings[0].clips
    assert plan.encoding_hours == pytest.approx(clips * tera / Rates().fp32 / 3600)


def test_days_are_those_of_gpus_that_can_share_a_step(recipe_file: Path) -> None:
    plan = plan_of(recipe_runs(recipe_file, ["optim.batch_size=12", "optim.accumulate=3"]))
    assert list(plan.days) == [1, 2, 4]


def test_memory_too_small_is_said(recipe_file: Path) -> None:
    # what is left to try: checkpointing
    small = ["objectives={}", "model.train=lora", "model.precision=bf16", "--memory", "1"]
    result = CliRunner().invoke(app, ["plan", str(recipe_file), *small])
    assert result.exit_code == 0
    # the context alone takes it
    assert "does not fit into 1 GiB, and no setting of a plan changes that" in result.output


def test_more_gpus_share_a_step(recipe_file: Path) -> None:
    config = load_run(recipe_file, ["optim.batch_size=4"])
    with ExitStack() as stack:
        one, two = (plan_run(config, Architectures(stack), gpus=gpus) for gpus in (1, 2))
        line = r"^optim.batch_size: 4 is no multiple of .* 1 x 3: set .* to a multiple of 3 GPUs"
        with pytest.raises(UserError, match=line):
            plan_run(config, Architectures(stack), gpus=3)
    assert (one.samples, two.samples) == (4, 2)
    assert two.step_flops[FORWARD] == one.step_flops[FORWARD]
    assert any(phase.name == "averaging" for phase in two.phases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "model.path=nobody/nothing"], "model.path: nobody/nothing: a plan needs its"),
        (["tiny", "teachers.dino.path=nobody/nothing"], "teachers.dino.path: nobody/nothing: a"),
        (["tiny", "model.path=Wan-AI/Wan2.2-T2V-A14B-Diffusers"], ".*A14B-Diffusers holds two tr"),
        (["wan21_14b", "model.expert=low"], "model.expert: .*14B-Diffusers holds one transformer"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        plan_of(recipe_runs(arguments[0], arguments[1:]))


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
    assert standing(offloaded, "optimizer state") == 0 < standing(offloaded, "weights")


@pytest.mark.parametrize("whole", [False, True])
def test_gradients_are_whole_in_shards_while_micro_batches_are_added_up(whole: bool) -> None:
    phase = Phase("step", 100, {"weights": 20, "gradients": 40, ASIDE: 40})
    shares = sharded(phase, 10, 4, whole_gradients=whole).parts
    assert shares == {"weights": 5, "gradients": 40 if whole else 10, ASIDE: 10, GATHERED: 4}


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
