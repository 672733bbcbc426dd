"""Whether a run of 40 steps that is prolonged to 80 is one of 80: by hand, in minutes on one core.

    python tests/campaigns/prolonged.py FOLDER

Trains the shipped `tiny` with all weights, with a moving average and with a LoRA: 80 steps at once,
and 40 that are prolonged, with a SIGKILL in each of the two parts (after steps 25 and 63, 5 and 3
steps after a checkpoint). Compares every tensor of the last checkpoint, the metrics, and all rows
of the log.
"""

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from alignlab.recipe import load_run
from kills import die_after, fork
from run_contents import timeless_metrics, timeless_rows

train_module: Any = importlib.import_module("alignlab.train")

SETTINGS = {
    "full": (),
    "ema": ("optim.ema=0.95",),
    "lora": ("model.train=lora", "model.lora.rank=8"),
}
SMALL = ("eval.clips=4", "eval.sample_clips=1", "eval.sample_steps=4", "tracking.mlflow=none")
EVERY = ("checkpoint.every=20", "tracking.log_every=3")


def train(settings: tuple[str, ...], dies_at: int | None) -> None:
    if dies_at is not None:
        die_after(train_module.Trainer, "step", lambda trainer, _: trainer.state.step == dies_at)
    train_module.train(load_run("tiny", [*SMALL, *EVERY, *settings]))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found = sorted((run / "checkpoints" / "step-000080").rglob("*.safetensors"))
    return {f"{f.name} {name}": value for f in found for name, value in load_file(f).items()}


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    for name, settings in SETTINGS.items():
        do: Callable[..., None] = partial(_part, name, (f"output={output}", *settings))
        do("long", 80, None)
        for steps, dies_at in ((40, 25), (40, None), (80, 63), (80, None)):
            do("short", steps, dies_at)
        long, short = (output / f"{name}-{which}" for which in ("long", "short"))
        one, two = tensors(long), tensors(short)
        other = [key for key in one.keys() | two.keys() if not torch.equal(one[key], two[key])]
        metrics = timeless_metrics(long), timeless_metrics(short)
        rows = timeless_rows(long), timeless_rows(short)
        notes = json.loads((short / "result.json").read_text())["notes"]
        print(
            f"{name}: {len(one) - len(other)} of {len(one)} tensors equal, "
            f"{sum(metrics[0][k] == metrics[1].get(k) for k in metrics[0])} of {len(metrics[0])} "
            f"metrics, {sum(a == b for a, b in zip(*rows, strict=False))} of {len(rows[0])} rows "
            f"({len(rows[1])} found); {notes[-1]}",
            flush=True,
        )


def _part(name: str, settings: tuple[str, ...], which: str, steps: int, dies: int | None) -> None:
    job = (*settings, f"name={name}-{which}", f"steps={steps}")
    fork(f"{name}, {steps} steps", partial(train, job, dies), dies=dies is not None)


main()
