"""What objectives read: recipes are held to it, and may do without a teacher."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from pydantic import ValidationError

from alignlab import attach
from alignlab.config.run import RunConfig, check_blocks
from alignlab.errors import UserError
from alignlab.evaluation.measured_names import measured_names
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.run import compare
from alignlab.losses.grids import patch_tokens
from alignlab.losses.objective import LATENTS
from alignlab.recipe import load_run
from alignlab.runs.run_folder import RunFolder
from alignlab.train import RunTrainer, train
from alignlab.training.setup import build_run
from attached_objectives import clips, run
from command_line import refused
from tiny_runs import MakeConfig

LAYERSYNC = "objectives={l: {name: layersync, blocks: [0], deep_blocks: [2]}}"
VAE = "{name: vae_repa, blocks: [1], projector_dim: 16}"
NO_TEACHER = ("objectives={}", "teachers={}")


@pytest.fixture(scope="module")
def untaught(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of a recipe without a teacher, which generates clips."""
    output = tmp_path_factory.mktemp("untaught")
    settings = [f"output={output}", *NO_TEACHER, LAYERSYNC, f"objectives.v={VAE}"]
    return RunFolder.open(train(load_run(recipe_file, [*settings, "eval.sample_clips=1"])))


def bare(metric: str) -> str:
    """Its name in the tables."""
    return metric.removeprefix("gen/").removeprefix("gen_real/").partition("/")[0]


def test_a_recipe_without_a_teacher_trains_and_says_what_is_not_measured(
    untaught: RunFolder, recipe_file: Path
) -> None:
    result = untaught.read_result()
    assert result is not None
    (note,) = [note for note in result["notes"] if "no teacher" in note]
    assert note.startswith("the recipe has no teacher: silhouette, cross_cos,")
    assert "of generated clips, reference_match_proxy" in note and "frechet" in note
    config, metrics = untaught.config(), result["metrics"]
    assert config.measured_against is None
    names = measured_names(config)
    assert {name for name in metrics if name.startswith(("val/", "gen/"))} <= set(names)
    assert "val/flow" in metrics and "gen/contrast" in metrics
    # it names what a teacher would add
    told = set(re.findall(r"\w+", note))
    taught = config.model_copy(update={"teachers": load_run(recipe_file).teachers})
    added = {bare(name) for name in {*measured_names(taught)} - {*names}}
    assert added and added <= told and not added & {bare(name) for name in metrics}


def test_it_is_compared_with_plain_fine_tuning_in_a_report(
    recipe_file: Path, tmp_path: Path
) -> None:
    text = recipe_file.read_text()
    head, _, rest = text.partition("teachers:")
    tail = rest[rest.index("optim:") :]
    variants = "variants: {none: {}, sync: {objectives.l: {name: layersync, blocks: [0], "
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        f"{head}{tail}baseline: none\nseeds: [0]\ncost: null\n{variants}deep_blocks: [2]}}}}}}\n"
    )
    report = compare(load_compare(recipe, [f"output={tmp_path / 'runs'}"]))
    shown = report.read_text()
    assert "sync" in shown and "the recipe has no teacher" in shown


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        (
            "{name: layersync, teacher: dino}",
            "objectives.x: layersync reads no teacher; remove teacher",
        ),
        ("{name: repa}", "objectives.x.teacher: missing"),
        (
            "{name: repa, teacher: null}",
            "objectives.x.teacher: repa reads a teacher: give an alias of the recipe's teachers",
        ),
        ("{name: repa, teacher: dina}", "unknown teacher 'dina', did you mean 'dino'?"),
        ("{name: layersync, deep_blocks: [16, 17]}", "deep_blocks names 2 blocks and blocks 1"),
        ("{name: layersync, blocks: [0], deep_blocks: [70]}", "objectives.x.deep_blocks: block 70"),
    ],
)
def test_a_recipe_is_held_to_what_its_objectives_read(
    objective: str, line: str, recipe_file: Path, tmp_path: Path
) -> None:
    told = refused("train", str(recipe_file), f"output={tmp_path}", f"objectives.x={objective}")
    assert line in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("optim", "line"),
    [
        ("{batch_size: 1}", "compares all samples of a step, and there is one"),
        (
            "{batch_size: 2, accumulate: 2}",
            "which optim.accumulate=2 spreads over passes of 1; set optim.accumulate=1",
        ),
        ("{batch_size: 4, accumulate: 2}", "spreads over passes of 2; set optim.accumulate=1"),
    ],
)
def test_pairs_of_a_step_need_it_whole(optim: str, line: str, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"^objectives\.d: dispersive compares all samples") as e:
        make_config("objectives.d={name: dispersive, blocks: [1]}", f"optim={optim}")
    assert line in str(e.value)


def test_several_ranks_are_refused_by_what_compares_samples(make_config: MakeConfig) -> None:
    built = build_run(make_config(*NO_TEACHER, "objectives.d={name: dispersive, blocks: [1]}"))
    with pytest.raises(UserError, match="compares the samples of a batch, which 2 ranks"):
        built.alignment.check_world_size(2)


def test_the_deeper_blocks_are_tapped_and_measured(make_config: MakeConfig) -> None:
    config = make_config(*NO_TEACHER, LAYERSYNC)
    built = build_run(config)
    assert built.alignment.blocks == (0, 2)
    trainer = RunTrainer(built)
    (batch,) = trainer.micro_batches()
    with built.branch:
        loss, terms = trainer.losses(batch)
    loss.backward()
    shallow, deep = (built.wan.transformer.blocks[b].ffn.net[2].weight.grad for b in (0, 2))
    assert shallow is not None and deep is not None and "sim/l" in terms
    with pytest.raises(UserError, match=r"objectives\.l\.deep_blocks: block 2 does not exist"):
        check_blocks(config, 2)


def test_clean_latents_reach_the_objective_patch_by_patch(make_config: MakeConfig) -> None:
    built = build_run(make_config(*NO_TEACHER, f"objectives.v={VAE}"))
    trainer = RunTrainer(built)
    (batch,) = trainer.micro_batches()
    seen: list[Any] = []
    built.alignment.objectives["v"].register_forward_pre_hook(
        lambda module, given: seen.append(given)
    )
    with built.branch, torch.no_grad():
        trainer.losses(batch)
    ((student, teacher, _),) = seen
    assert list(teacher) == [LATENTS] and teacher[LATENTS].grid == student[1].grid
    expected = patch_tokens(batch.latents_BCTHW, (2, 2))
    assert torch.equal(teacher[LATENTS].tokens_BTPD, expected)


def test_a_taught_objective_stands_beside_an_untaught_one(make_config: MakeConfig) -> None:
    built = build_run(make_config(f"objectives.v={VAE}", LAYERSYNC))
    assert set(built.alignment.objectives) == {"ra", "v", "l"}
    assert set(built.alignment.teachers) == {"dino"}
    assert not any("no teacher" in note for note in built.notes)


def test_stored_recipes_of_objectives_without_a_teacher_are_read(untaught: RunFolder) -> None:
    config = untaught.config()
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="layersync reads no teacher"):
        RunConfig.model_validate(
            config.model_dump() | {"objectives": {"l": {"name": "layersync", "teacher": "dino"}}}
        )


def test_a_loop_of_ones_own_gives_the_latents_that_are_read(
    transformer: WanTransformer3DModel,
) -> None:
    vae = {"name": "vae_repa", "blocks": [1], "projector_dim": 8}
    with attach(transformer, objectives={"v": vae}) as alignment:
        run(alignment, transformer)
        lacking = r"^objectives\.v: vae_repa reads Clips\.latents_BCTHW, which is not given$"
        with pytest.raises(UserError, match=lacking):
            alignment(clips(frames_BTHWC=None), 0)
        given = torch.randn(2, 4, 2, 4, 4)
        run(alignment, transformer)
        found = alignment(clips(frames_BTHWC=None, latents_BCTHW=given), 0).terms["v"]
        assert found.loss_B.shape == (2,) and found.loss_B.requires_grad
    with pytest.raises(
        UserError, match=r"^Clips\.latents_BCTHW: expected floating \(B, C, T, H, W"
    ):
        clips(latents_BCTHW=given[:, :, :1])
