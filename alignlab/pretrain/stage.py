"""The training loop that all asset stages share: AdamW, cosine decay, EMA, resumable.

A stage's state is one safetensors file, written to a temporary name and renamed, so that a
killed build goes on from its last save.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.optimizer_state import named_state, restore_state

EMA_DECAY = 0.999
WARMUP = 100


def train_stage(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    work: Path,
    save_every: int = 200,
) -> None:
    """Trains `module` in place and leaves its EMA weights in it.

    Args:
        name: progress label and file name of the state.
        module: what is trained; frozen parameters are left alone.
        loss_at: step -> named losses; their sum is minimised. Must depend on the step alone.
        steps: optimizer steps in total, earlier sessions included.
        lr: peak learning rate; linear warm-up over 100 steps, then cosine to 1 % of it.
        work: folder for the state file.
        save_every: steps between saves.
    """
    names = {p: n for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(names, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {n: p.detach().clone() for p, n in names.items()}
    state_file = work / f"{name}.safetensors"
    start = _load(state_file, names, optimizer, ema)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=steps, completed=start, losses="")
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * _lr_scale(step, steps)
            losses = loss_at(step)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(list(names), 1.0)
            optimizer.step()
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            for parameter, key in names.items():
                ema[key].lerp_(parameter.detach(), 1 - decay)
            if step % 20 == 0:
                shown = "  ".join(f"{k} {v.item():.4f}" for k, v in losses.items())
                progress.update(task, losses=shown)
            progress.advance(task)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                _save(state_file, step + 1, names, optimizer, ema)
    with torch.no_grad():
        for parameter, key in names.items():
            parameter.copy_(ema[key])


def _lr_scale(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _save(
    path: Path,
    step: int,
    names: dict[nn.Parameter, str],
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor],
) -> None:
    tensors = {f"model.{n}": p.detach().contiguous() for p, n in names.items()}
    tensors |= {f"ema.{n}": value for n, value in ema.items()}
    tensors |= {f"optimizer.{n}": value for n, value in named_state(optimizer, names).items()}
    tensors["step"] = torch.tensor(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def _load(
    path: Path,
    names: dict[nn.Parameter, str],
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor],
) -> int:
    """Restores a saved state, if there is one, and returns the step to go on from."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    prefix = "optimizer."
    restore_state(
        optimizer, names, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    )
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(tensors[f"model.{name}"])
            ema[name].copy_(tensors[f"ema.{name}"])
    return int(tensors["step"])
