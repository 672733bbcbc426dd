"""Runs `alignlab train` in processes that share a model, or in one alone.

A job is `NAME RANKS MOMENT OVERRIDE...`: it trains the run FOLDER/NAME in so many forked processes,
which are told of each other. What rank r says goes to FOLDER/NAME.r; exit codes, a line for each
job, to stdout.

Moments: `whole`; `killed` (all die of SIGKILL after step 3, and what they leave is copied to
killed-left); `from-killed` (goes on with a copy of that); `from-one` (with a copy of the run
by-one, without what it wrote at step 4); `writing` (the last dies while it writes
the checkpoint of step 4); `counted` (rank r writes into FOLDER/NAME.references.r how many
references the samples of each micro-batch have); `parts` (trains nothing: `replica_parts`, which
writes to FOLDER/NAME).
"""

import importlib
import os
import shutil
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rank_processes import forked_ranks, run_command
from replica_parts import check_parts

train_module: Any = importlib.import_module("alignlab.train")
sharded_files: Any = importlib.import_module("alignlab.training.sharded_files")
take_step, losses = train_module.Trainer.step, train_module.RunTrainer.losses
write = sharded_files.ShardWriter.write_data


def killed(trainer: Any, batches: Any) -> Any:
    scalars = take_step(trainer, batches)
    if trainer.state.step == 3:
        trainer._writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return scalars


def half_written(writer: Any, plan: Any, planner: Any) -> Any:
    done = write(writer, plan, planner)
    if "step-000004" in str(writer.path) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return done


def counted(file: Path) -> Any:
    def counting(trainer: Any, batch: Any) -> Any:
        with file.open("a") as lines:
            lines.write(" ".join(str(len(r)) for r in batch.references) + "\n")
        return losses(trainer, batch)

    return counting


def child(recipe: Path, folder: Path, job: list[str], rank: int) -> None:
    name, _, moment, *overrides = job
    if moment == "killed":
        train_module.Trainer.step = killed
    elif moment == "writing":
        sharded_files.ShardWriter.write_data = half_written
    elif moment == "counted":
        file = folder / f"{name}.references.{rank}"
        train_module.RunTrainer.losses = counted(file)
    elif moment == "parts":
        check_parts(folder / name)
        return
    arguments = ["train", str(recipe), f"output={folder}", f"name={name}", *overrides]
    run_command(arguments, folder / f"{name}.{rank}")


def train_jobs(recipe: Path, folder: Path, jobs: Sequence[str]) -> None:
    """Trains one after the other."""
    for job in (line.split() for line in jobs):
        if job[2] == "from-killed":
            shutil.copytree(folder / "killed-left", folder / job[0])
        elif job[2] == "from-one":
            shutil.copytree(folder / "by-one", folder / job[0])
            (folder / job[0] / "result.json").unlink()
            shutil.rmtree(folder / job[0] / "checkpoints/step-000004")
        ends = forked_ranks(int(job[1]), partial(child, recipe, folder, job))
        print(*ends, flush=True)
        if job[2] == "killed":
            shutil.copytree(folder / job[0], folder / "killed-left")
