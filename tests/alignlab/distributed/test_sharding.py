"""Two and three real processes with one model: as one process trains, and as if never killed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.distributed.ranks import Ranks
from alignlab.distributed.sharding import (
    local_part,
    reduce_gradients,
    shard_transformer,
    total_norm,
)
from alignlab.export import export
from alignlab.models.wan import load_wan
from alignlab.training.checkpoint import ModelChoice, _load_whole
from run_contents import timeless_metrics, timeless_rows
from shard_checks import assert_as_one, drive, weights, write_recipe

SHARDS = "model.shard=fsdp2"
LATER = "checkpoint.asynchronous=true"
TWO = f"{SHARDS} model.gradient_checkpointing=true"
LORA = "model.train=lora model.lora.rank=4 model.lora.alpha=8 objectives.repa=null eval.every=null"
LORA += " eval.sample_clips=0 eval.generated_clips=0"
STEPS_20 = "steps=20 optim.batch_size=2 optim.accumulate=1 optim.ema=null objectives.repa=null"
STEPS_20 += " eval.every=null eval.clips=1 eval.sample_clips=0 eval.generated_clips=0"
STEPS_20 += " tracking.log_every=20 checkpoint.every=20"

ONE_STEP = "steps=1 optim.lr=1e-9 eval.every=null eval.clips=1 eval.sample_clips=0"
ONE_STEP += " eval.generated_clips=0"


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(recipe_file, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def runs(recipe: Path) -> Path:
    """The folder of all runs; what `killed` left was resumed by two, by three and by one."""
    copy = recipe.parent / "two" / "checkpoints" / "weights-000003"
    ends = drive(
        recipe,
        "one 1 whole",
        f"two 2 whole {TWO} checkpoint.weights_every=1",
        f"killed 2 killed {TWO} {LATER}",
        f"by-two 2 from-killed {TWO} {LATER}",
        f"by-three 3 from-killed {TWO}",
        f"by-one 1 from-killed {TWO} checkpoint.every_minutes=1e-9",
        f"of-one 2 from-one {TWO}",
        f"writing 2 writing {TWO}",
        f"later 2 writing {TWO} {LATER}",
        f"lora-one 1 whole {LORA}",
        f"lora-three 3 whole {LORA} {SHARDS}",
        f"counted 2 counted {STEPS_20} {SHARDS}",
        f"begun-one 1 whole {ONE_STEP} model.init_from={copy}",
        f"begun-two 2 whole {ONE_STEP} {TWO} model.init_from={copy}",
    )
    assert ends[:7] == ["0", "0 0", "-9 -9", "0 0", "0 0 0", "0", "0 0"]
    assert ends[7:] == ["1 -9", "1 -9", "0", "0 0 0", "0 0", "0", "0 0"]
    return recipe.parent


def moments(run: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state, by file."""
    step = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {
        f"{path.name} {key}": value
        for path in sorted(step.glob("optimizer/*.safetensors"))
        for key, value in load_file(path).items()
    }


def test_two_processes_with_one_model_train_as_one_does(runs: Path) -> None:
    assert_as_one(runs / "one", runs / "two")
    assert any("val/flow" in row for row in timeless_rows(runs / "two")[:-1])
    one, two = (timeless_metrics(runs / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-2, abs=1e-3)
    assert any(name.startswith("gen/") for name in one)
    files = [sorted(p.name for p in (runs / name / "samples").iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]


def test_each_process_writes_a_part_of_the_weights_and_of_their_average(runs: Path) -> None:
    for run in ("two", "by-two", "of-one"):
        step = runs / run / "checkpoints" / "step-000004"
        names = sorted(path.name for path in step.iterdir() if path.is_dir())
        assert names == ["ema_shards", "optimizer", "transformer_shards"]
        for folder in ("ema_shards", "transformer_shards"):
            files = sorted((step / folder).iterdir())
            rows = [len(load_file(file)["patch_embedding.weight"]) for file in files]
            assert rows == [24, 24], [file.name for file in files]
    assert "copied to main memory by this rank" in (runs / "by-two.0").read_text()


def test_each_process_holds_a_part_of_the_optimizers_state(runs: Path) -> None:
    names = [
        file.name for file in (runs / "two" / "checkpoints" / "step-000004/optimizer").iterdir()
    ]
    assert len(names) == 2
    sizes = {key: value.shape for key, value in moments(runs / "two").items()}
    halves = [size for key, size in sizes.items() if "patch_embedding.weight|exp_avg_sq" in key]
    assert [size[0] for size in halves] == [24, 24]
    only_first = [key for key in sizes if "objectives." in key]
    assert only_first and all("shard-00001" in key for key in only_first)


def test_three_processes_train_a_lora_as_one_does(runs: Path) -> None:
    assert_as_one(runs / "lora-one", runs / "lora-three")


def test_a_killed_pair_ends_with_the_bits_of_the_uninterrupted_one(runs: Path) -> None:
    assert [p.name for p in (runs / "killed-left/checkpoints").iterdir()] == ["step-000002"]
    assert timeless_rows(runs / "by-two") == timeless_rows(runs / "two")
    for read in (weights, moments):
        expected, found = read(runs / "two"), read(runs / "by-two")
        assert found.keys() == expected.keys() and expected
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("name", ["by-three", "by-one", "of-one"])
def test_another_number_of_processes_resumes_what_two_left(runs: Path, name: str) -> None:
    assert_as_one(runs / "two", runs / name)
    said = (runs / f"{name}.0").read_text()
    assert ("this process is the only one" in said) == (name == "by-one")


def test_other_runs_start_from_weights_in_shards(runs: Path) -> None:
    """One that has no shards, and one in shards; from a copy of weights too."""
    assert_as_one(runs / "begun-one", runs / "begun-two")
    copy = runs / "two" / "checkpoints" / "weights-000003"
    parts = [load_file(file) for file in sorted((copy / "transformer_shards").iterdir())]
    begun = weights(runs / "begun-one")
    for name, value in parts[0].items():
        whole = begun[f"transformer {name}"]
        if value.shape != whole.shape:
            value = torch.cat([part[name] for part in parts if name in part])
        torch.testing.assert_close(whole, value, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["writing", "later"])
def test_a_kill_within_a_checkpoint_leaves_the_one_before(runs: Path, name: str) -> None:
    left = [p.name for p in (runs / name / "checkpoints").iterdir() if p.name.startswith("step")]
    assert left == ["step-000002"]
    assert "another rank has stopped" in (runs / f"{name}.0").read_text().strip().split("\n")[-1]


def test_ranks_with_different_numbers_of_references_keep_step(runs: Path) -> None:
    counts = [(runs / f"counted.references.{rank}").read_text().split("\n") for rank in range(2)]
    assert [len(lines) for lines in counts] == [21, 21]
    assert sum(first != second for first, second in zip(*counts, strict=True)) >= 10
    assert json.loads((runs / "counted/result.json").read_text())["steps"] == 20


def test_the_model_is_exported_and_loaded_by_diffusers(runs: Path, tmp_path: Path) -> None:
    folder = export(runs / "two", tmp_path / "two")
    pipeline = WanPipeline.from_pretrained(folder)
    stored = weights(runs / "two")
    for name, value in pipeline.transformer.named_parameters():
        assert torch.equal(value, stored[f"ema {name}"]), name
    for step in (2, 3):  # copies of weights: of a checkpoint, and by themselves
        export(runs / "two", tmp_path / f"{step}", ModelChoice(step=step))
        names = {path.name for path in (runs / f"two/checkpoints/weights-00000{step}").iterdir()}
        assert {"transformer_shards", "ema_shards"} < names and "optimizer" not in names
    last = export(runs / "two", tmp_path / "last", ModelChoice(ema=False))
    for name, value in WanPipeline.from_pretrained(last).transformer.named_parameters():
        assert torch.equal(value, stored[f"transformer {name}"]), name


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["tracking.diagnose_every=2"], "tracking.diagnose_every: takes whole weights"),
        (["optim.name=adamw_8bit"], "optim.name (adamw_8bit): "),
        (
            ["model.weights=bf16", "model.precision=bf16", "optim.name=adamw_bf16_kahan"],
            "optim.name (adamw_bf16_kahan): ",
        ),
        (["objectives.ra.weight.gradient_share=0.1"], "objectives.ra.weight (gradient_share): "),
        (
            ["objectives.sra={name: sra, blocks: [0], deep_blocks: [2]}"],
            "objectives.sra (sra: a moving average of the student): takes",
        ),
    ],
)
def test_what_needs_whole_gradients_is_refused(
    recipe: Path, tmp_path: Path, overrides: list[str], line: str
) -> None:
    arguments = ["train", str(recipe), f"output={tmp_path}", SHARDS, *overrides]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert line in result.stderr and "set model.shard: none" in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.fixture
def sharded(wan_folder: Path, tmp_path: Path) -> Iterator[WanTransformer3DModel]:
    """A transformer in shards, all of which this process has."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    transformer = load_wan(str(wan_folder)).transformer
    shard_transformer(transformer, Ranks(torch.device("cpu"), "fp32"))
    yield transformer
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_gradients_are_exchanged_after_the_last_micro_batch_alone(
    sharded: WanTransformer3DModel,
) -> None:
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 32)
    for is_last in (False, True):
        velocity = sharded(latents, torch.tensor([500.0]), text, return_dict=False)[0]
        reduce_gradients(sharded, is_last=is_last)
        velocity.square().mean().backward()
        gradients = [parameter.grad for parameter in sharded.parameters()]
        assert all((gradient is None) != is_last for gradient in gradients)
    both = total_norm([gradient for gradient in gradients if gradient is not None])
    sharded.zero_grad()
    sharded(latents, torch.tensor([500.0]), text, return_dict=False)[0].square().mean().backward()
    first = total_norm([p.grad for p in sharded.parameters() if p.grad is not None])
    torch.testing.assert_close(both, 2 * first)


@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_norms_show_what_is_not_finite_in_a_shard(
    sharded: WanTransformer3DModel, norm_type: float
) -> None:
    tensors = [*sharded.parameters(), torch.ones(3)]
    assert total_norm(tensors, norm_type).isfinite()
    with torch.no_grad():
        local_part(sharded.blocks[1].scale_shift_table)[0, 0, 0] = torch.nan
    assert not total_norm(tensors, norm_type).isfinite()


def test_weights_of_a_model_of_another_depth_are_refused_as_without_shards(
    sharded: WanTransformer3DModel,
) -> None:
    own = sharded.state_dict()
    weights = {name: local_part(value).clone() for name, value in own.items()}
    _load_whole(own, weights)
    left = weights.pop("blocks.1.scale_shift_table")
    with pytest.raises(RuntimeError, match=r"only one of the two has blocks\.1\.scale_shift"):
        _load_whole(own, weights)
    weights |= {"blocks.1.scale_shift_table": left, "blocks.99.scale_shift_table": left}
    with pytest.raises(RuntimeError, match=r"only one of the two has blocks\.99\.scale_shift"):
        _load_whole(own, weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "rel"),
    [
        ("optim.grad_clip=null optim.ema=null", 1e-5),
        ("model.gradient_checkpointing=true optim.accumulate=1 optim.grad_clip=1.0", 1e-5),
        ("model.absent_references=zero objectives.ra=null", 1e-5),
        (f"{LORA} model.gradient_checkpointing=every:2", 1e-5),
        ("model.gradient_checkpointing=ops objectives.ra=null", 1e-5),
        ("model.precision=bf16 eval.generated_clips=0", 5e-3),
        (f"{LORA} model.precision=bf16 eval.generated_clips=0", 5e-3),
    ],
    ids=["no-clip", "one-micro-batch", "zeros", "lora-every", "ops", "bf16", "lora-bf16"],
)
def test_every_setting_trains_in_shards_as_in_one(
    recipe: Path, tmp_path: Path, overrides: str, rel: float
) -> None:
    own = tmp_path / "recipe.yaml"
    own.write_text(recipe.read_text())
    jobs = [f"one 1 whole {overrides}"]
    jobs += [f"of-{count} {count} whole {SHARDS} {overrides}" for count in (2, 3)]
    assert drive(own, *jobs) == ["0", "0 0", "0 0 0"]
    for count in (2, 3):
        # a retrieval counts nearest neighbours among nine tokens: of two as near, bf16 takes either
        apart = ("teacher_retrieval/",) if "bf16" in overrides else ()
        assert_as_one(tmp_path / "one", tmp_path / f"of-{count}", rel=rel, apart=apart)
