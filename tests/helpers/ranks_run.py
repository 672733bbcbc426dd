"""Runs `alignlab train` in two processes that know each other, as torchrun starts them.

    python ranks_run.py RECIPE MOMENT=OUTPUT...

Each MOMENT=OUTPUT is a pair of processes, one pair after the other, forked: torch is imported
once. What each says goes to MOMENT-OUTPUT.0 and .1 beside OUTPUT; exit codes, in order, to stdout.
What the pair `killed` leaves is copied to `as-killed` beside OUTPUT.

Moments: `whole`, `killed` (both die of SIGKILL after step 5), `unreached` (the samples of the
second miss the last parameter), `lora`, `again` (nothing is left to do), `warned` (the second gets
SIGUSR1 within step 4). In others something stops
them: `drifted` (the second changes its weights at step 1), `teacher` (the second has another
teacher), `parts` (it names another part), `gone` (it dies at step 1), `odd` (a batch of 3),
`across` (negatives across the batch), `other` (another recipe than `whole`, in its folder).
"""

import gc
import importlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from alignlab.cli import main as command
from mlflow_tables import copying
from rank_processes import forked_ranks

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


def child(rank: int, recipe: str, moment: str, output: str) -> None:
    folder, name = os.path.split(output)
    said = os.open(f"{folder}/{moment}-{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    train_module.Trainer.step = STEPS.get(moment, take_step)
    if moment == "teacher" and rank:
        alignment.teacher_of_clips = other_teacher
    ranks.BUCKET = 1000  # many of them, and tensors larger than one
    sys.argv = ["alignlab", "train", recipe, f"output={output}", *OVERRIDES.get(moment, [])]
    if moment not in ("whole", "killed", "again", "other"):
        sys.argv.append("tracking.mlflow=none")  # whose database takes seconds
    if (moment, name) == ("whole", "whole"):  # ends as a command does, others at once
        gc.unfreeze()  # else Triton's binding tells at the end what was never collected
        command()
    try:
        command()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))  # taking the interpreter apart takes seconds


def main() -> None:
    torch.set_num_threads(1)
    # else each pair does, for seconds
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    folder = Path(sys.argv[2].split("=")[1]).parent
    folder.mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()  # else each process searches all that is imported
    with copying(folder / "first-mlflow.db"):
        for job in sys.argv[2:]:
            train_pair(*job.split("="))


def train_pair(moment: str, output: str) -> None:
    print(*forked_ranks(2, lambda rank: child(rank, sys.argv[1], moment, output)), flush=True)
    if moment == "killed":
        shutil.copytree(output, Path(output).with_name("as-killed"))


main()
sys.stdout.flush()
os._exit(0)  # as the children
