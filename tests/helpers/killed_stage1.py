"""Trains Stage 1 networks in processes that kill themselves with SIGKILL, and resumes them.

    python killed_stage1.py FOLDER KIND...

For each kind, with the recipe FOLDER/KIND.yaml and for each moment: output FOLDER/KIND/MOMENT, and
beside it `MOMENT-killed`, as the kill left it. Each training is a process of its own.
"""

import importlib
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignlab.recipe import load_stage1_run
from kills import die_after, fork

MOMENTS = (
    "between checkpoints",
    "right after a checkpoint",
    "while the result is written",
)
# Any, so that names can be replaced
train: Any = importlib.import_module("alignlab.stage1.train")
checkpoint: Any = importlib.import_module("alignlab.training.checkpoint")


def prepare(moment: str) -> None:
    if moment == "between checkpoints":
        die_after(train.Trainer, "step", lambda trainer, batches: trainer.state.step == 5)
    elif moment == "right after a checkpoint":
        die_after(checkpoint, "save", lambda state, checkpoints: state.step == 6)
    elif moment == "while the result is written":
        die_after(train, "save_stage1", lambda folder, module, info: True)
    elif moment != "never":
        raise ValueError(moment)


def train_until(recipe: Path, kind: Any, moment: str, output: Path) -> None:
    prepare(moment)
    train.train_stage1(load_stage1_run(kind, recipe, [f"output={output}"]))


def run(recipe: Path, kind: Any, moment: str, output: Path) -> None:
    """Trains in a child process, which has to end as the moment says."""
    work = partial(train_until, recipe, kind, moment, output)
    fork(f"{kind}, {moment}", work, dies=moment != "never")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for kind in sys.argv[2:]:
        recipe = folder / f"{kind}.yaml"
        run(recipe, kind, "never", folder / kind / "uninterrupted")
        for moment in MOMENTS:
            output = folder / kind / moment
            run(recipe, kind, moment, output)
            shutil.copytree(output, output.with_name(f"{moment}-killed"))
            run(recipe, kind, "never", output)


main()
