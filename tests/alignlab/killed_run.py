"""Trains runs in processes that kill themselves with SIGKILL at a chosen moment.

    python killed_run.py RECIPE MOMENT=OUTPUT...

Each MOMENT=OUTPUT is a process of its own, one after the other. `never` lets the run finish.
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
from safetensors.torch import save_file

from alignlab.recipe import load_run

# Any, so that their names can be replaced
checkpoint: Any = importlib.import_module("alignlab.training.checkpoint")
atomic_files: Any = importlib.import_module("alignlab.runs.atomic_files")
train_module: Any = importlib.import_module("alignlab.train")
Trainer = train_module.Trainer
rmtree = shutil.rmtree
died = Path()  # is written by a process that kills itself, so that no other kill passes for it


def die() -> None:
    died.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(module: Any, name: str, when: Callable[..., bool]) -> None:
    """Kills the process once `module.name(...)` has returned with arguments that fit `when`."""
    original = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if when(*args):
            die()
        return result

    setattr(module, name, wrapped)


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


def main() -> None:
    global died
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        moment, output = job.split("=")
        died = Path(f"{output}.died")
        child = os.fork()
        if child == 0:
            prepare(moment)
            train_module.train(load_run(sys.argv[1], [f"output={output}"]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if killed and (moment == "never" or not died.exists()):
            sys.exit(f"{job}: killed by another process, or for want of memory")
        if killed == (moment == "never") or (not killed and status):
            sys.exit(f"{job}: ended with {status}")


main()
