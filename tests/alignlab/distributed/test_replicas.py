"""Four real processes with two replicas of a model, each in two shards (`model.replicate`)."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from alignlab.cli import app
from alignlab.config.model import ModelConfig
from alignlab.distributed.sharding import num_shards
from alignlab.errors import UserError
from shard_checks import assert_as_one, drive, write_recipe

FEW = "optim.batch_size=8 eval.every=null eval.sample_clips=0 eval.clips=1 eval.generated_clips=0"
SHARDS = f"{FEW} model.shard=fsdp2"
REPLICAS = f"{SHARDS} model.replicate=2"


@pytest.fixture(scope="module")
def runs(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; what four processes left was resumed by four, two and one."""
    recipe = write_recipe(recipe_file, tmp_path_factory.mktemp("replicas"))
    ends = drive(
        recipe,
        "parts 4 parts",
        f"one 1 whole {FEW}",
        f"killed 4 killed {REPLICAS}",
        f"by-four 4 from-killed {REPLICAS} checkpoint.asynchronous=true",
        f"by-two 2 from-killed {SHARDS}",
        f"by-one 1 from-killed {REPLICAS}",
    )
    errors = (recipe.parent / "driver" / "errors").read_text()
    assert ends == ["0 0 0 0", "0", "-9 -9 -9 -9", "0 0 0 0", "0 0", "0"], errors
    return recipe.parent


def test_a_network_in_replicas_is_counted_gathered_and_written_once(runs: Path) -> None:
    files = sorted((runs / "parts").iterdir())
    assert [len(load_file(file)["blocks.0.weight"]) for file in files] == [3, 2]


@pytest.mark.parametrize("name", ["by-four", "by-two", "by-one"])
def test_two_replicas_of_two_shards_train_as_one_process_does(runs: Path, name: str) -> None:
    assert_as_one(runs / "one", runs / name)


def test_the_first_replica_alone_writes_its_parts(runs: Path) -> None:
    for run, step in (("killed-left", 2), ("by-four", 4)):
        checkpoint = runs / run / f"checkpoints/step-{step:06d}"
        for folder in ("transformer_shards", "ema_shards"):
            files = sorted((checkpoint / folder).iterdir())
            rows = [len(load_file(file)["patch_embedding.weight"]) for file in files]
            assert rows == [24, 24], [file.name for file in files]
        assert len(list((checkpoint / "optimizer").iterdir())) == 2


@pytest.mark.parametrize(
    ("ranks", "replicas", "line"),
    [
        (4, 3, "4 ranks are no multiple of 3 replicas"),
        (2, 4, "2 ranks are no multiple of 4 replicas"),
        (4, 4, "set model.shard=none model.replicate=1"),
    ],
)
def test_ranks_that_do_not_divide_into_replicas_are_refused(
    recipe_file: Path, tmp_path: Path, ranks: int, replicas: int, line: str
) -> None:
    config = ModelConfig(path="wan", shard="fsdp2", replicate=replicas)
    with pytest.raises(UserError, match=f"^model.replicate: .*{line}"):
        num_shards(config, ranks)
    arguments = [str(recipe_file), "model.shard=fsdp2", f"model.replicate={replicas}"]
    arguments += [f"optim.batch_size={ranks}", "--gpus", str(ranks)]
    planned = CliRunner().invoke(app, ["plan", *arguments])
    assert planned.exit_code == 2 and line in planned.stderr, planned.output


def test_replicas_without_shards_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    arguments = ["train", str(recipe_file), f"output={tmp_path}", "model.replicate=2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert "replicate: 2 needs shard: fsdp2" in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_ranks_divide_into_shards_of_each_replica() -> None:
    config = ModelConfig(path="wan", shard="fsdp2", replicate=2)
    assert [num_shards(config, ranks) for ranks in (1, 4, 6)] == [1, 2, 3]
    assert num_shards(ModelConfig(path="wan", shard="fsdp2"), 4) == 4
    assert num_shards(ModelConfig(path="wan"), 4) == 1
