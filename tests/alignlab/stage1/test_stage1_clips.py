"""What Stage 1 makes of a clip: tokens, texts, masks and flow on the grid of the recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import VJEPA2Config, VJEPA2Model

from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.distributed.ranks import single_rank
from alignlab.recipe import load_stage1_run
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.moalign import MoAlignTask
from alignlab.stage1.sara import SaraTask
from alignlab.stage1.train import Stage1Trainer
from made_clips import decoded_pixels

KINDS = ["sara", "moalign"]
Recipes = dict[str, Path]


def config_of(recipes: Recipes, kind: Any, *overrides: str) -> Stage1Config:
    return load_stage1_run(kind, recipes[kind], list(overrides))


def trainer_of(config: Stage1Config) -> Stage1Trainer:
    return Stage1Trainer(config, single_rank("fp32"))


def test_sara_asks_for_entities_all_and_background(recipes: Recipes) -> None:
    run = trainer_of(config_of(recipes, "sara"))
    sample = ShapesDataset(run.config.data, "train")[0]  # type: ignore[arg-type]
    clip = run.clips[0]
    assert clip.texts == (*sample.entities, ", ".join(sample.entities), "background")
    assert clip.entities == len(sample.entities) and clip.features_TPD.shape == (5, 9, 24)
    assert clip.targets_KTP.unique().tolist() == [0, 1]
    masks = sample.masks_ETHW
    assert masks is not None
    for row, mask in zip(clip.targets_KTP, [*masks, masks.any(0), ~masks.any(0)], strict=True):
        cells = mask.float().view(5, 3, 16, 3, 16).mean((2, 4)).flatten(1)
        assert torch.equal(row, (cells > 0.5).float())
    plain = trainer_of(config_of(recipes, "sara", "stage1.background=null")).clips[0]
    assert plain.texts == clip.texts[:-1] and len(plain.targets_KTP) == len(plain.texts)


def test_infonce_leaves_out_repeated_texts_and_follows_its_weight(recipes: Recipes) -> None:
    task = trainer_of(config_of(recipes, "sara", "stage1.nce_weight=0.5")).task
    assert isinstance(task, SaraTask)
    run = trainer_of(config_of(recipes, "sara"))
    one, two = run.clips[0], run.clips[1]
    total, terms = task.loss([one, two])
    torch.testing.assert_close(total, terms["loss/bce"] + 0.5 * terms["loss/info_nce"])
    same = replace(one, texts=("a", "a", *one.texts[2:]))
    assert task.loss([same])[1]["loss/info_nce"] < task.loss([one])[1]["loss/info_nce"]
    alone = replace(one, texts=("a",) * len(one.texts))
    assert task.loss([alone])[1]["loss/info_nce"].item() == pytest.approx(0, abs=1e-5)


def test_flow_of_the_data_set_or_of_opencv(recipes: Recipes) -> None:
    clips = {}
    for source in ("auto", "dis"):
        run = trainer_of(config_of(recipes, "moalign", f"stage1.flow={source}"))
        clips[source] = run.clips[0].flow_TPC
        assert clips[source].shape == (4, 9, 2)
    assert not torch.equal(clips["auto"], clips["dis"])
    task = run.task
    assert isinstance(task, MoAlignTask)
    sample = ShapesDataset(run.config.data, "train")[0]  # type: ignore[arg-type]
    exact_run = trainer_of(config_of(recipes, "moalign", "data.cache.mode=off"))
    unknown = exact_run.task.encode(decoded_pixels(replace(sample, flow_THWC=None)))
    torch.testing.assert_close(unknown.flow_TPC, clips["dis"])


def test_the_recipe_grid_is_what_the_teacher_is_asked_for(recipes: Recipes) -> None:
    for kind in KINDS:
        run = trainer_of(config_of(recipes, kind, "teachers.dino.grid=[4,6]"))
        assert run.clips[0].features_TPD.shape == (5, 24, 24)
        assert run.models.grid == (4, 6)


def test_a_video_teacher_gives_a_time_step_per_tubelet(recipes: Recipes, tmp_path: Path) -> None:
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    predictor = {f"pred_{key}": value for key, value in shape.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VJEPA2Model(VJEPA2Config(**shape, **predictor, crop_size=48)).save_pretrained(tmp_path)
    teacher = f"teachers.dino={{family: vjepa2, path: {tmp_path}, feature: post_norm}}"
    shapes = {"sara": ("targets_KTP", (4, 9)), "moalign": ("flow_TPC", (3, 9, 2))}
    for kind, (name, expected) in shapes.items():
        run = trainer_of(config_of(recipes, kind, teacher, "data.frames=9"))
        clip = run.clips[0]
        assert clip.features_TPD.shape == (4, 9, 24)
        assert getattr(clip, name).shape[-len(expected) :] == expected
        assert run.task.loss([clip])[0].isfinite()
