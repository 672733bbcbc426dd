"""Recipes of three steps for both kinds of Stage 1, and the networks that they give."""

from pathlib import Path

import pytest

from alignlab.recipe import load_stage1_run
from alignlab.stage1.train import train_stage1

RECIPE = """
name: first
steps: 3
data: {{name: shapes, frames: 5, size: [48, 48], references: [2, 3], train_clips: 6, val_clips: 4}}
teachers:
  dino: {{family: dinov2, path: {teacher}, feature: post_norm}}
optim: {{lr: 1e-3, batch_size: 2, warmup: 2, schedule: cosine}}
checkpoint: {{every: 3, keep: 2}}
tracking: {{mlflow: none, log_every: 1}}
"""
SARA = """
model: {{path: {wan}}}
stage1: {{kind: sara, heads: 3, hidden: 8, embed_dim: 8, val_clips: 3}}
"""
MOALIGN = "stage1: {kind: moalign, width: 8, hidden: 8, decoder: 8, val_clips: 3}\n"

Recipes = dict[str, Path]


@pytest.fixture(scope="session")
def recipes(
    wan_folder: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recipes:
    """A recipe of three steps for each kind."""
    folder = tmp_path_factory.mktemp("stage1-recipes")
    texts = {"sara": SARA.format(wan=wan_folder), "moalign": MOALIGN}
    for kind, text in texts.items():
        (folder / f"{kind}.yaml").write_text(RECIPE.format(teacher=teacher_folder) + text)
    return {kind: folder / f"{kind}.yaml" for kind in texts}


@pytest.fixture(scope="session")
def networks(recipes: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """A finished Stage 1 folder of each kind; not to be changed."""
    output = tmp_path_factory.mktemp("stage1")
    return {
        kind: train_stage1(load_stage1_run(kind, recipe, [f"output={output}", f"name={kind}"]))
        for kind, recipe in recipes.items()
    }
