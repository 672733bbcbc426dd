"""Trains runs in processes that kill themselves with SIGKILL at a chosen moment."""

import importlib
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.recipe import load_run
from alignlab.runs.checkpoint_folders import newest_step
from kills import die, die_after, fork

# Any, so that their names can be replaced
checkpoint: Any = importlib.import_module("alignlab.training.checkpoint")
save_checkpoint: Any = importlib.import_module("alignlab.training.save_checkpoint")
atomic_files: Any = importlib.import_module("alignlab.runs.atomic_files")
train_module: Any = importlib.import_module("alignlab.train")
Trainer = train_module.Trainer
rmtree = shutil.rmtree


def half_written(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    if path.parent.name == ".step-000006.tmp" and path.name == "optimizer.safetensors":
        os.truncate(path, path.stat().st_size // 2)
        die()


def half_removed(path: Path, **kwargs: Any) -> None:
    if path.name == ".step-000003.removed" and path.exists():
        (path / "state.json").unlink()
        die()
    rmtree(path, **kwargs)


def prepare(moment: str) -> None:
    if moment == "before any checkpoint":
        die_after(Trainer, "step", lambda trainer, batches: trainer.state.step == 2)
    elif moment == "between checkpoints":
        die_after(Trainer, "step", lambda trainer, batches: trainer.state.step == 5)
    elif moment == "right after a checkpoint":
        die_after(save_checkpoint, "prune", lambda checkpoints, *_: newest_step(checkpoints) == 6)
    elif moment == "while writing a checkpoint":
        checkpoint.save_file = half_written
    elif moment == "while removing a checkpoint":
        atomic_files.shutil.rmtree = half_removed
    elif moment == "while evaluating":
        die_after(train_module, "evaluate", lambda run, folder: True)
    elif moment != "never":
        raise ValueError(moment)


def train_until(recipe: Path, moment: str, output: Path) -> None:
    torch.set_num_threads(1)
    prepare(moment)
    train_module.train(load_run(recipe, [f"output={output}"]))


def run(recipe: Path, moment: str, output: Path) -> None:
    """Trains in a child process, which has to end as the moment says."""
    work = partial(train_until, recipe, moment, output)
    fork(f"{output.name}, {moment}", work, dies=moment != "never")


def run_all(recipe: Path, folder: Path, moments: Sequence[str]) -> None:
    """Trains to the end once, and once for each moment: killed then, and resumed.

    Each training is a forked process of its own, one after the other.

    Args:
        recipe: of the run.
        folder: gets the output `uninterrupted`, and for each moment the output of that name and
            `<moment>-killed`, as the kill left it.
        moments: as `prepare` knows them.
    """
    run(recipe, "never", folder / "uninterrupted")
    for moment in moments:
        output = folder / moment
        run(recipe, moment, output)
        shutil.copytree(output, output.with_name(f"{moment}-killed"))
        run(recipe, "never", output)
