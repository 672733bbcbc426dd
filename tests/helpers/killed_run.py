"""Trains runs in processes that kill themselves with SIGKILL at a chosen moment.

    python killed_run.py RECIPE FOLDER MOMENT...

For each moment: output FOLDER/MOMENT, and beside it `MOMENT-killed`, as the kill left it; before
them, FOLDER/uninterrupted. Each training is a process of its own, one after the other.
"""

import importlib
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.recipe import load_run
from kills import die, die_after, fork

# Any, so that their names can be replaced
checkpoint: Any = importlib.import_module("alignlab.training.checkpoint")
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
        die_after(checkpoint, "save", lambda state, checkpoints: state.step == 6)
    elif moment == "while writing a checkpoint":
        checkpoint.save_file = half_written
    elif moment == "while removing a checkpoint":
        atomic_files.shutil.rmtree = half_removed
    elif moment == "while evaluating":
        die_after(train_module, "evaluate", lambda run, folder: True)
    elif moment != "never":
        raise ValueError(moment)


def train_until(recipe: str, moment: str, output: Path) -> None:
    prepare(moment)
    train_module.train(load_run(recipe, [f"output={output}"]))


def run(recipe: str, moment: str, output: Path) -> None:
    """Trains in a child process, which has to end as the moment says."""
    work = partial(train_until, recipe, moment, output)
    fork(f"{output.name}, {moment}", work, dies=moment != "never")


def main() -> None:
    torch.set_num_threads(1)
    recipe, folder, *moments = sys.argv[1:]
    run(recipe, "never", Path(folder, "uninterrupted"))
    for moment in moments:
        output = Path(folder, moment)
        run(recipe, moment, output)
        shutil.copytree(output, output.with_name(f"{moment}-killed"))
        run(recipe, "never", output)


main()
