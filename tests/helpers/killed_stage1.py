"""Trains Stage 1 networks in processes that kill themselves with SIGKILL, and resumes them."""

import importlib
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignlab.recipe import load_stage1_run
from alignlab.runs.checkpoint_folders import newest_step
from kills import die_after, fork

MOMENTS = (
    "between checkpoints",
    "right after a checkpoint",
    "while the result is written",
)
# Any, so that names can be replaced
train: Any = importlib.import_module("alignlab.stage1.train")
save_checkpoint: Any = importlib.import_module("alignlab.training.save_checkpoint")


def prepare(moment: str) -> None:
    if moment == "between checkpoints":
        die_after(train.Trainer, "step", lambda trainer, batches: trainer.state.step == 5)
    elif moment == "right after a checkpoint":
        die_after(save_checkpoint, "prune", lambda checkpoints, *_: newest_step(checkpoints) == 6)
    elif moment == "while the result is written":
        die_after(train, "save_stage1", lambda folder, module, info: True)
    elif moment != "never":
        raise ValueError(moment)


def train_until(recipe: Path, kind: Any, moment: str, output: Path) -> None:
    torch.set_num_threads(1)
    prepare(moment)
    train.train_stage1(load_stage1_run(kind, recipe, [f"output={output}"]))


def run(recipe: Path, kind: Any, moment: str, output: Path) -> None:
    """Trains in a child process, which has to end as the moment says."""
    work = partial(train_until, recipe, kind, moment, output)
    fork(f"{kind}, {moment}", work, dies=moment != "never")


def run_all(folder: Path, kinds: Iterable[str]) -> None:
    """Trains each kind to the end once, and once for each of `MOMENTS`: killed then, and resumed.

    Each training is a forked process of its own, one after the other.

    Args:
        folder: has the recipe `<kind>.yaml` of each kind, and gets the outputs
            `<kind>/uninterrupted`, `<kind>/<moment>`, and `<kind>/<moment>-killed`, as the kill
            left it.
        kinds: of Stage 1.
    """
    for kind in kinds:
        recipe = folder / f"{kind}.yaml"
        run(recipe, kind, "never", folder / kind / "uninterrupted")
        for moment in MOMENTS:
            output = folder / kind / moment
            run(recipe, kind, moment, output)
            shutil.copytree(output, output.with_name(f"{moment}-killed"))
            run(recipe, kind, "never", output)
