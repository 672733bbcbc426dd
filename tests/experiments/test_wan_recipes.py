"""The shipped recipes of real size fit the number of GPUs that they name."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from alignlab.config.data import FolderConfig
from alignlab.config.recipe_file import recipe_folder, shipped_recipes
from alignlab.config.run import RunConfig
from alignlab.distributed.ranks import Ranks
from alignlab.errors import UserError
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.fairness import check_fair
from alignlab.losses.sara import SaraConfig
from alignlab.recipe import dump, load_run, load_stage1_run
from alignlab.runs.run_folder import RunFolder

WAN = sorted(name for name in shipped_recipes() if name.startswith("wan2"))
LARGE = ["wan21_14b", "wan22_5b", "wan22_a14b_sara"]
IN_SHARDS = [f"{name}_8gpu" for name in LARGE]
COUNTS = {"one": 1, "eight": 8}


class Shipped(NamedTuple):
    gpus: int
    runs: list[RunConfig]


def shipped(name: str) -> Shipped:
    """What its first line says it is for, and the runs that it trains."""
    said = re.search(r"(one|eight) 80 GB GPUs?,", shipped_recipes()[name])
    assert said is not None, "the first line says for how many GPUs"
    text = (recipe_folder() / f"{name}.yaml").read_text()
    if "\nvariants:" not in text:
        return Shipped(COUNTS[said[1]], [load_run(name, [])])
    config = load_compare(name, [])
    assert config.launch.gpus == COUNTS[said[1]]
    return Shipped(
        COUNTS[said[1]], [config.run(variant, config.seeds[0]) for variant in config.variants]
    )


def of_rank(config: RunConfig, rank: int, gpus: int) -> list[range]:
    ranks = Ranks(torch.device("cpu"), config.model.precision)
    ranks.rank, ranks.world_size = rank, gpus
    return ranks.micro_batches(config.optim.accumulate, config.optim.batch_size)


def test_there_are_recipes_for_one_and_for_eight() -> None:
    assert [(name, shipped(name).gpus) for name in WAN] == [
        ("wan21_1.3b_1gpu", 1),
        ("wan21_1.3b_8gpu", 8),
        ("wan21_1.3b_compare", 1),
        *((name + end, gpus) for name in LARGE for end, gpus in (("", 1), ("_8gpu", 8))),
    ]


@pytest.mark.parametrize("name", WAN)
def test_each_gpu_holds_one_sample_at_a_time(name: str) -> None:
    gpus, runs = shipped(name)
    for config in runs:
        rounds = [of_rank(config, rank, gpus) for rank in range(gpus)]
        assert {len(batch) for batches in rounds for batch in batches} == {1}
        everything = sorted(i for batches in rounds for batch in batches for i in batch)
        assert everything == list(range(config.optim.batch_size))
        assert config.eval.batch_size == 1 and config.model.gradient_checkpointing


def test_the_recipes_for_one_and_for_eight_train_alike() -> None:
    one, eight = (load_run(f"wan21_1.3b_{n}gpu", []) for n in (1, 8))
    assert (one.optim.batch_size, one.optim.accumulate, eight.optim.accumulate) == (128, 128, 16)
    alike = ["name=x", "optim.accumulate=1"]
    assert dump(load_run("wan21_1.3b_1gpu", alike)) == dump(load_run("wan21_1.3b_8gpu", alike))


@pytest.mark.parametrize("name", LARGE)
def test_all_weights_are_trained_in_shards_and_a_lora_on_one_gpu(name: str) -> None:
    one, eight = load_run(name, []).model, load_run(f"{name}_8gpu", []).model
    assert (one.train, one.shard, eight.train, eight.shard) == ("lora", "none", "full", "fsdp2")
    alike = {"train": "full", "lora": None, "shard": "fsdp2"}
    assert one.model_copy(update=alike) == eight


def test_the_former_name_says_what_took_its_place() -> None:
    with pytest.raises(UserError, match=r"is now wan21_1.3b_8gpu .* or wan21_1.3b_1gpu"):
        load_run("wan21_1.3b", [])


def test_the_comparison_is_fair() -> None:
    config = load_compare("wan21_1.3b_compare", [])
    check_fair(config)
    assert list(config.variants) == ["none", "refalign", "repa", "videorepa", "crepa", "sara"]
    assert len(config.seeds) >= 3 and config.baseline == "none"


@pytest.mark.parametrize(
    "name", ["wan21_1.3b_compare", "stage1_sara_wan21_1.3b", *LARGE, *IN_SHARDS]
)
def test_every_setting_has_its_source(name: str) -> None:
    lines = (recipe_folder() / f"{name}.yaml").read_text().splitlines()
    settings = [line for line in lines if re.match(r"\s*\w+: \S", line)]
    names = re.compile(r"\s*(name|family|kind|seed: 0|baseline|none)\b")
    without = [line for line in settings if "  # " not in line and not names.match(line)]
    model = ["  path: Wan-AI/Wan2.1-T2V-1.3B-Diffusers"] if name == "wan21_1.3b_compare" else []
    assert without == model


def test_the_comparison_reads_what_its_stage_1_leaves() -> None:
    stage1 = load_stage1_run("sara", "stage1_sara_wan21_1.3b", [])
    run = load_compare("wan21_1.3b_compare", []).run("sara", 0)
    (objective,) = run.objectives.values()
    assert isinstance(objective, SaraConfig)
    assert objective.aligner == str(RunFolder(Path(stage1.output) / stage1.name).stage1)
    teacher = run.teachers[objective.teacher]
    assert {objective.teacher: teacher} == stage1.teachers and teacher.grid == stage1.teacher.grid
    model = stage1.model
    assert model is not None
    assert (model.path, model.precision) == (run.model.path, run.model.precision)
    assert isinstance(run.data, FolderConfig) and isinstance(stage1.data, FolderConfig)
    assert stage1.data.path == run.data.path and stage1.data.fps == run.data.fps
    # masks of the comparison's clips, made by `alignlab data masks`, cover those of Stage 1
    assert stage1.data.metadata == "metadata-masks.jsonl"
    assert stage1.data.frames <= run.data.frames


@pytest.mark.parametrize(("name", "batch"), [("wan22_a14b_sara", 40), ("wan22_a14b_sara_8gpu", 8)])
def test_sara_trains_the_expert_of_its_paper(name: str, batch: int) -> None:
    run = load_run(name, [])
    (objective,) = run.objectives.values()
    assert isinstance(objective, SaraConfig) and objective.blocks == (17,)
    assert (run.model.expert, run.flow.sampler, run.flow.shift) == ("high", "logit_normal", 12.0)
    assert (run.optim.batch_size, run.steps, run.data.size) == (batch, 3000, (480, 848))
    # the command in its head leaves the network that it names, trained for its teacher and text
    head = (recipe_folder() / f"{name}.yaml").read_text().split("# Sources")[0]
    command = re.search(r"stage1 sara (\S+) data.path=FOLDER (.*)\n#\s+(.*)\n", head)
    assert command is not None
    stage1 = load_stage1_run("sara", command[1], [*command[2].split(), *command[3].split()])
    assert objective.aligner == str(RunFolder(Path(stage1.output) / stage1.name).stage1)
    assert {objective.teacher: run.teachers[objective.teacher]} == stage1.teachers
    assert stage1.model is not None and stage1.model.path == run.model.path


def test_5b_has_clips_that_its_tokens_divide() -> None:
    run = load_run("wan22_5b", [])
    assert all(side % 32 == 0 for side in run.data.size) and run.model.expert is None
    assert (run.data.frames, run.data.fps, run.flow.shift) == (121, 24, 5.0)
    assert run.model.reference_timestep == "zero"
