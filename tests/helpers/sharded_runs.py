"""Runs `alignlab train` in processes that share a model, or in one alone.

    python sharded_runs.py RECIPE FOLDER JOB...

A JOB is `NAME RANKS MOMENT OVERRIDE...`: it trains the run FOLDER/NAME in so many forked processes,
which are told of each other; torch is imported once. What rank r says goes to FOLDER/NAME.r; exit
codes, a line for each job, to stdout.

Moments: `whole`; `killed` (all die of SIGKILL after step 3, and what they leave is copied to
killed-left); `from-killed` (goes on with a copy of that); `from-one` (with a copy of the run
by-one, without what it wrote at step 4); `writing` (the last dies while it writes
the checkpoint of step 4); `counted` (rank r writes into FOLDER/NAME.references.r how many
references the samples of each micro-batch have); `parts` (trains nothing: `replica_parts`, which
writes to FOLDER/NAME).
"""

import gc
import importlib
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignlab.cli import main as command
from rank_processes import forked_ranks
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


def child(recipe: str, folder: Path, job: list[str], rank: int) -> None:
    name, _, moment, *overrides = job
    said = os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
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
    sys.argv = ["alignlab", "train", recipe, f"output={folder}", f"name={name}", *overrides]
    try:
        command()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))  # taking the interpreter apart takes seconds


def main() -> None:
    torch.set_num_threads(1)
    recipe, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()  # else each process searches all that is imported
    for job in (line.split() for line in sys.argv[3:]):
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


main()
sys.stdout.flush()
os._exit(0)  # as the children
