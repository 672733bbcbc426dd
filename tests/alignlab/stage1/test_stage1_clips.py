"""What Stage 1 makes of a clip: tokens, texts, masks and flow on the grid of the recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import VJEPA2Config, VJEPA2Model

from alignlab.data.sample import Sample
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.distributed.ranks import single_rank
from alignlab.recipe import load_stage1_run
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.moalign import MoAlignTask
from alignlab.stage1.sara import SaraTask
from alignlab.stage1.train import Stage1Trainer, stage1_trainer
from made_clips import decoded_pixels

KINDS = ["sara", "moalign"]
Recipes = dict[str, Path]


def config_of(recipes: Recipes, kind: Any, *overrides: str) -> Stage1Config:
    return load_stage1_run(kind, recipes[kind], list(overrides))


def trainer_of(config: Stage1Config) -> Stage1Trainer:
    return stage1_trainer(config, single_rank("fp32"))


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


def partly_undecided(sample: Sample) -> Sample:
    """One entity on a grid of 3x3 tokens: tokens 1 and 2 may be the entity or background."""
    masks_ETHW = torch.zeros(1, 5, 48, 48, dtype=torch.bool)
    undecided_THW = torch.zeros(5, 48, 48, dtype=torch.bool)
    masks_ETHW[0, :, :16, :16] = True  # token 0: the entity's
    undecided_THW[:, :16, 16:32] = True  # token 1: nobody knows
    masks_ETHW[0, :, :5, 32:] = True  # token 2: 0.31 the entity's, 0.44 undecided
    undecided_THW[:, 5:12, 32:] = True
    undecided_THW[:, 16:21, :16] = True  # token 3: 0.31 undecided, else background
    masks_ETHW[0, :, 16:26, 16:32] = True  # token 4: 0.63 the entity's, else undecided
    undecided_THW[:, 26:32, 16:32] = True
    return replace(sample, entities=("a card",), masks_ETHW=masks_ETHW, undecided_THW=undecided_THW)


def test_undecided_tokens_are_neither_the_entitys_nor_background(recipes: Recipes) -> None:
    run = trainer_of(config_of(recipes, "sara", "data.cache.mode=off"))
    task, sample = run.task, ShapesDataset(run.config.data, "train")[0]  # type: ignore[arg-type]
    assert isinstance(task, SaraTask)
    clip = task.encode(decoded_pixels(partly_undecided(sample)))
    assert clip.counted_KTP is not None and clip.texts == ("a card", "a card", "background")
    entity, everything, background = clip.targets_KTP[:, 0]
    assert entity.nonzero().flatten().tolist() == [0, 4] and torch.equal(everything, entity)
    assert background.nonzero().flatten().tolist() == [3, 5, 6, 7, 8]
    for counted_TP in clip.counted_KTP:
        assert (~counted_TP[0]).nonzero().flatten().tolist() == [1, 2]

    with torch.no_grad():
        features_KTPD = clip.features_TPD.expand(3, -1, -1, -1)
        logits_KTP = task.network(features_KTPD, clip.texts_KLD).logits_BTP
        tokens = [0, 3, 4, 5, 6, 7, 8]
        bce = F.binary_cross_entropy_with_logits(
            logits_KTP[..., tokens], clip.targets_KTP[..., tokens]
        )
        terms = task.loss([clip])[1]
        torch.testing.assert_close(terms["loss/bce"], bce)
        known = run.clips[0]  # a clip without any beside it
        both, alone = task.loss([clip, known])[1], task.loss([known])[1]
    count = len(known.texts)
    mean = (3 * bce + count * alone["loss/bce"]) / (3 + count)
    torch.testing.assert_close(both["loss/bce"], mean)
    found = task.evaluate([clip])
    assert found["val/bce"] == pytest.approx(float(bce))
    assert found["val/iou_union"] == 1
    last = task.network.saliency_head[-1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, 100.0)  # it marks all tokens
    found = task.evaluate([clip])
    assert found["val/iou"] == found["val/iou_caption"] == pytest.approx(2 / 7)
    assert found["val/iou_background"] == pytest.approx(5 / 7)


def test_what_is_undecided_throughout_teaches_and_measures_nothing(recipes: Recipes) -> None:
    run = trainer_of(config_of(recipes, "sara", "data.cache.mode=off"))
    task, sample = run.task, ShapesDataset(run.config.data, "train")[0]  # type: ignore[arg-type]
    assert isinstance(task, SaraTask) and sample.masks_ETHW is not None
    unknown = replace(
        sample,
        masks_ETHW=torch.zeros_like(sample.masks_ETHW),
        undecided_THW=torch.ones_like(sample.masks_ETHW[0]),
    )
    clip = task.encode(decoded_pixels(unknown))
    total, terms = task.loss([clip])
    assert terms["loss/bce"] == 0 and torch.isfinite(total)
    known = run.clips[0]
    both, alone = task.loss([clip, known])[1], task.loss([known])[1]
    torch.testing.assert_close(both["loss/bce"], alone["loss/bce"])
    assert task.evaluate([clip]) == {}


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
