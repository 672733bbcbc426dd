"""Trains Stage 1 networks in processes that kill themselves with SIGKILL, and goes on with them.

    python killed_stage1.py FOLDER KIND...

For each kind, with the recipe FOLDER/KIND.yaml and for each moment: output FOLDER/KIND/MOMENT, and
beside it `MOMENT-killed`, as the kill left it. Each training is a process of its own.
"""

import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alignlab.recipe import load_stage1_run

MOMENTS = (
    "between checkpoints",
    "right after a checkpoint",
    "while the result is written",
)
# Any, so that names can be replaced
train: Any = importlib.import_module("alignlab.stage1.train")
checkpoint: Any = importlib.import_module("alignlab.training.checkpoint")


def die_after(module: Any, name: str, when: Callable[..., bool]) -> None:
    """Kills the process once `module.name(...)` has returned with arguments that fit `when`."""
    original = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, wrapped)


def prepare(moment: str) -> None:
    if moment == "between checkpoints":
        die_after(train.Trainer, "step", lambda trainer, batches: trainer.state.step == 5)
    elif moment == "right after a checkpoint":
        die_after(checkpoint, "save", lambda state, checkpoints: state.step == 6)
    elif moment == "while the result is written":
        die_after(train, "save_stage1", lambda folder, module, info: True)
    elif moment != "never":
        raise ValueError(moment)


def run(recipe: Path, kind: Any, moment: str, output: Path) -> None:
    """Trains in a child process, which has to end as the moment says."""
    child = os.fork()
    if child == 0:
        prepare(moment)
        train.train_stage1(load_stage1_run(kind, recipe, [f"output={output}"]))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if killed == (moment == "never") or (not killed and status):
        sys.exit(f"{kind}, {moment}: ended with {status}")


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
