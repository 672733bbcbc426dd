"""What a recipe says that it measures is what its runs measure."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import VJEPA2Config, VJEPA2Model

from alignlab.config.run import RunConfig
from alignlab.evaluation.evaluate import evaluate
from alignlab.evaluation.measured_names import COSTS, measured_names
from alignlab.runs.run_folder import RunFolder
from alignlab.training.setup import build_run

MakeConfig = Callable[..., RunConfig]


def measured(config: RunConfig) -> set[str]:
    """Names of what an untrained model of this run is measured by."""
    return set(evaluate(build_run(config), RunFolder.create(config).samples))


def promised(config: RunConfig) -> set[str]:
    return set(measured_names(config)) - set(COSTS)


@pytest.fixture
def video_teacher(tmp_path: Path) -> str:
    """A setting that adds a tiny V-JEPA 2."""
    config = VJEPA2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        crop_size=48,
        frames_per_clip=8,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    with torch.random.fork_rng():
        VJEPA2Model(config).save_pretrained(tmp_path / "vjepa")
    return f"teachers.late={{family: vjepa2, path: {tmp_path / 'vjepa'}, feature: post_norm}}"


@pytest.mark.parametrize(
    "settings",
    [
        ["eval.sample_clips=1", "eval.blocks=[1]"],
        ["eval.blocks=[0,3]", "eval.clips=1", "eval.generated_clips=0", "eval.sample_clips=1"],
        ["eval.blocks=[0]", "data.references=[0,0]", "eval.generated_clips=1"],
        ["eval.blocks=[0]", "data.references=[1,1]", "eval.generated_clips=1"],
        ["data.frames=1", "eval.generated_clips=2"],
    ],
    ids=["clips", "tokens", "no references", "one reference", "one frame"],
)
def test_all_that_is_promised_is_measured_and_nothing_else(
    make_config: MakeConfig, settings: list[str]
) -> None:
    config = make_config(*settings, aligned=False)
    names = measured(config)
    # an untrained model shows no subjects that could be confused
    assert names | ({"gen/confusion_proxy"} & promised(config)) == promised(config)


def test_without_a_teacher_and_with_one_of_clips(
    make_config: MakeConfig, video_teacher: str
) -> None:
    config = make_config("eval.generated_clips=1", "eval.blocks=[0]", aligned=False)
    bare = config.model_copy(update={"teachers": {}, "name": "bare"})
    assert measured(bare) == promised(bare)
    settings = ["data.frames=9", "eval.blocks=[0]", "eval.generated_clips=1", "name=video"]
    video = make_config(video_teacher, "eval.teacher=late", *settings, aligned=False)
    assert measured(video) == promised(video)


def test_a_finished_run_holds_no_other_name(make_config: MakeConfig, full_run: Path) -> None:
    result = json.loads((full_run / "result.json").read_text())
    assert set(measured_names(make_config())) == set(result["metrics"])
