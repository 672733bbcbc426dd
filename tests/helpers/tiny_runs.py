"""Recipes for runs that take seconds: random tiny Wan and DINOv2, 48x48 clips of 5 frames."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from alignlab.config.run import RunConfig
from alignlab.recipe import load_run
from alignlab.train import Trainer, train
from alignlab.training.batches import Batch
from alignlab.training.step_terms import StepScalars
from kills import Killed

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]

RECIPE = """
name: run
steps: 2
model: {{path: {wan}}}
data: {{name: shapes, frames: 5, size: [48, 48], references: [2, 3], train_clips: 6, val_clips: 4}}
teachers:
  dino: {{family: dinov2, path: {teacher}, feature: post_norm}}
objectives:
  ra: {{name: refalign, teacher: dino, blocks: [0, 2]}}
optim: {{lr: 1e-3, batch_size: 2}}
eval: {{clips: 2, batch_size: 8, sample_clips: 0, sample_steps: 2}}
tracking: {{mlflow: none, log_every: 1}}
"""


def write_teacher(folder: Path) -> Path:
    """Writes a DINOv2 of two layers, width 24 and patch 16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=48,
                patch_size=16,
            )
        )
        # transformers' initial weights are tiny: make features depend on the image
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_teacher` writes."""
    return write_teacher(tmp_path_factory.mktemp("tiny-dino"))


@pytest.fixture(scope="session")
def recipe_file(
    wan_folder: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two steps with RefAlign on blocks 0 and 2."""
    path = tmp_path_factory.mktemp("recipe") / "run.yaml"
    path.write_text(RECIPE.format(wan=wan_folder, teacher=teacher_folder))
    return path


@pytest.fixture
def make_config(recipe_file: Path, tmp_path: Path) -> MakeConfig:
    """`make_config("steps=3", ...)` gives that run, writing below the test's folder."""

    def make(*overrides: str, aligned: bool = True) -> RunConfig:
        config = load_run(recipe_file, [f"output={tmp_path}", *overrides])
        return config if aligned else config.model_copy(update={"objectives": {}})

    return make


@pytest.fixture(scope="session")
def full_run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained all weights; not to be changed."""
    output = tmp_path_factory.mktemp("full")
    return train(load_run(recipe_file, [f"output={output}"]))


@pytest.fixture(scope="session")
def lora_run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained a LoRA; not to be changed."""
    output = tmp_path_factory.mktemp("lora")
    lora = ["model.train=lora", "model.lora.rank=4", "model.lora.alpha=8", "optim.lr=0.1"]
    return train(load_run(recipe_file, [f"output={output}", *lora]))


@pytest.fixture
def train_until() -> TrainUntil:
    """`train_until(config, 2)` trains and dies, as if killed, before the third step."""

    def run_until(config: RunConfig, step: int) -> None:
        take_step = Trainer.step

        def dying(trainer: Trainer, batches: list[Batch]) -> StepScalars:
            if trainer.state.step == step:
                raise Killed
            return take_step(trainer, batches)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Trainer, "step", dying)
            train(config)

    return run_until
