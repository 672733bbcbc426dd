"""Runs `alignlab train` in two processes that know each other, as torchrun starts them.

Each MOMENT=OUTPUT is a pair of processes, one pair after the other, forked. What each says goes to
MOMENT-OUTPUT.0 and .1 beside OUTPUT; exit codes, in order, to stdout.
What the pair `killed` leaves is copied to `as-killed` beside OUTPUT.

Moments: `whole`, `killed` (both die of SIGKILL after step 5), `unreached` (the samples of the
second miss the last parameter), `lora`, `again` (nothing is left to do), `warned` (the second gets
SIGUSR1 within step 4). In others something stops
them: `drifted` (the second changes its weights at step 1), `teacher` (the second has another
teacher), `parts` (it names another part), `gone` (it dies at step 1), `odd` (a batch of 3),
`across` (negatives across the batch), `other` (another recipe than `whole`, in its folder).
"""

import importlib
import os
import shutil
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlflow_tables import copying
from rank_processes import forked_ranks, run_command

train_module: Any = importlib.import_module("alignlab.train")
alignment: Any = importlib.import_module("alignlab.training.run_alignment")
ranks: Any = importlib.import_module("alignlab.distributed.ranks")
take_step, teacher_of_clips = train_module.Trainer.step, alignment.teacher_of_clips
LORA = ["model.train=lora", "model.lora.rank=4", "model.lora.alpha=8", "model.precision=bf16"]
LORA += ["optim.grad_clip=null", "model.absent_references=zero"]
OVERRIDES = {
    "lora": LORA,
    "odd": ["optim.batch_size=3", "optim.accumulate=1"],
    "across": ["objectives.ra.negatives=batch"],
    "other": ["optim.lr=1e-4"],
}


def killed(trainer: Any, batches: Any) -> Any:
    scalars = take_step(trainer, batches)
    if trainer.state.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return scalars


def drifted(trainer: Any, batches: Any) -> Any:
    if trainer.state.step == 1 and not trainer.ranks.is_main:
        with torch.no_grad():
            next(iter(trainer.state.names)).add_(1e-3)
    return take_step(trainer, batches)


def unreached(trainer: Any, batches: Any) -> Any:
    parameter = list(trainer.state.names)[-1]
    if not trainer.ranks.is_main:
        hook = parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    scalars = take_step(trainer, batches)
    if not trainer.ranks.is_main:
        hook.remove()
    return scalars


def parts(trainer: Any, batches: Any) -> Any:
    if trainer.state.step == 1 and not trainer.ranks.is_main:
        means = trainer.ranks.means
        trainer.ranks.means = lambda values: means({"loss/none": torch.ones(2), **values})
    return take_step(trainer, batches)


def gone(trainer: Any, batches: Any) -> Any:
    if trainer.state.step == 1 and not trainer.ranks.is_main:
        os._exit(9)
    return take_step(trainer, batches)


def warned(trainer: Any, batches: Any) -> Any:
    if trainer.state.step == 3 and not trainer.ranks.is_main:
        os.kill(os.getpid(), signal.SIGUSR1)
    return take_step(trainer, batches)


STEPS = {
    "warned": warned,
    "killed": killed,
    "drifted": drifted,
    "unreached": unreached,
    "parts": parts,
    "gone": gone,
}


def other_teacher(*args: Any, **settings: Any) -> Any:
    teacher = teacher_of_clips(*args, **settings)
    teacher.digest()  # loads it: later, the load would find its files changed
    vars(teacher)["parts"] = {**teacher.parts, "weights": "of other files"}
    return teacher


def child(recipe: Path, moment: str, output: Path, rank: int) -> None:
    train_module.Trainer.step = STEPS.get(moment, take_step)
    if moment == "teacher" and rank:
        alignment.teacher_of_clips = other_teacher
    ranks.BUCKET = 1000  # many of them, and tensors larger than one
    arguments = ["train", str(recipe), f"output={output}", *OVERRIDES.get(moment, [])]
    if moment not in ("whole", "killed", "again", "other"):
        arguments.append("tracking.mlflow=none")  # whose database takes seconds
    said = output.with_name(f"{moment}-{output.name}.{rank}")
    run_command(arguments, said, whole=(moment, output.name) == ("whole", "whole"))


def train_pairs(recipe: Path, jobs: Sequence[str]) -> None:
    """Trains them one after the other; all outputs are in one folder."""
    # else each pair does, for seconds
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    with copying(Path(jobs[0].split("=")[1]).parent / "first-mlflow.db"):
        for job in jobs:
            moment, output = job.split("=")
            train_pair(recipe, moment, Path(output))


def train_pair(recipe: Path, moment: str, output: Path) -> None:
    print(*forked_ranks(2, partial(child, recipe, moment, output)), flush=True)
    if moment == "killed":
        shutil.copytree(output, output.with_name("as-killed"))
