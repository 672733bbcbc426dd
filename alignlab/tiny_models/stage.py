"""The training loop that all asset stages share: Muon and AdamW, cosine decay, EMA, resumable.

Matrices and convolution kernels are trained with Muon. On the tiny autoencoder, 240 steps of it
reach 22.1 dB where AdamW reaches 16.7 dB (16 images per step, same time per step).

A stage's state is one safetensors file, written to a temporary name and renamed, so that a
killed build resumes from its last save.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.progress import step_progress
from alignlab.runs.atomic_files import whole_file
from alignlab.training.checkpoint import named_state, restore_state
from alignlab.training.sharded_files import SEPARATOR

EMA_DECAY = 0.999
WARMUP = 50
MUON_LR = 0.02
ADAMW_LR = 2e-3


def train_stage(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    work: Path,
    save_every: int = 200,
) -> None:
    """Trains `module` in place and leaves its EMA weights in it.

    Args:
        name: progress label and file name of the state.
        module: what is trained; frozen parameters are left alone.
        loss_at: step -> named losses; their sum is minimised. Must depend on the step alone.
        steps: optimizer steps in total, earlier sessions included; the learning rate warms up over
            50 of them and falls to 1 % along a cosine.
        work: folder for the state file.
        save_every: steps between saves.
    """
    names = {p: n for n, p in module.named_parameters() if p.requires_grad}
    optimizers = StageOptimizers(module)
    ema = {n: p.detach().clone() for p, n in names.items()}
    state_file = work / f"{name}.safetensors"
    start = _load(state_file, names, optimizers, ema)
    with step_progress(name, total=steps, done=start) as advance:
        shown = ""
        for step in range(start, steps):
            losses = loss_at(step)
            module.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(list(names), 1.0)
            optimizers.step(_lr_scale(step, steps))
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            for parameter, key in names.items():
                ema[key].lerp_(parameter.detach(), 1 - decay)
            if step % 20 == 0:
                shown = "  ".join(f"{k} {v.item():.4f}" for k, v in losses.items())
            advance(step + 1, shown)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                _save(state_file, step + 1, names, optimizers, ema)
    with torch.no_grad():
        for parameter, key in names.items():
            parameter.copy_(ema[key])


class StageOptimizers:
    """Muon for matrices and convolution kernels, AdamW for everything else.

    torch's Muon takes matrices alone, so it is given `(out, rest)` views that share their memory
    with the parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        embeddings = {
            p for m in module.modules() if isinstance(m, nn.Embedding) for p in [m.weight]
        }
        trained = [p for p in module.parameters() if p.requires_grad]
        kernels = [p for p in trained if _is_kernel(p) and p not in embeddings]
        self._views = {p: nn.Parameter(p.data.view(len(p), -1)) for p in kernels}
        self._others = [p for p in trained if p not in self._views]
        self._muon = torch.optim.Muon(self._views.values(), lr=MUON_LR, weight_decay=0.01)
        self._adamw = torch.optim.AdamW(
            self._others, lr=ADAMW_LR, betas=(0.9, 0.99), weight_decay=0.01
        )

    def step(self, lr_scale: float) -> None:
        """One update with the gradients that the parameters hold."""
        for parameter, view in self._views.items():
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        pairs: list[tuple[torch.optim.Optimizer, float]]
        pairs = [(self._muon, MUON_LR), (self._adamw, ADAMW_LR)]
        for optimizer, lr in pairs:
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_scale
            optimizer.step()

    def state(self, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
        """Both optimizers' state by parameter name."""
        views = {view: names[p] for p, view in self._views.items()}
        state = named_state(self._muon, views) | named_state(self._adamw, names)
        return {name: value.cpu().contiguous() for name, value in state.items()}

    def restore(self, names: dict[nn.Parameter, str], tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        views = {view: names[p] for p, view in self._views.items()}
        others = {p: names[p] for p in self._others}
        for optimizer, owned in ((self._muon, views), (self._adamw, others)):
            mine = set(owned.values())
            part = {k: v for k, v in tensors.items() if k.rsplit(SEPARATOR, 1)[0] in mine}
            restore_state(optimizer, owned, part)


def _is_kernel(parameter: nn.Parameter) -> bool:
    """A matrix or a convolution kernel: no bias, no gain of a norm, no modulation table."""
    return parameter.ndim in (2, 4, 5) and parameter[0].numel() > 1


def _lr_scale(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _save(
    path: Path,
    step: int,
    names: dict[nn.Parameter, str],
    optimizers: StageOptimizers,
    ema: dict[str, Tensor],
) -> None:
    tensors = {f"model.{n}": p.detach().contiguous() for p, n in names.items()}
    tensors |= {f"ema.{n}": value for n, value in ema.items()}
    tensors |= {f"optimizer.{n}": value for n, value in optimizers.state(names).items()}
    tensors["step"] = torch.tensor(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        save_file(tensors, partial)


def _load(
    path: Path,
    names: dict[nn.Parameter, str],
    optimizers: StageOptimizers,
    ema: dict[str, Tensor],
) -> int:
    """Restores a saved state, if there is one, and returns the step to resume from."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    prefix = "optimizer."
    optimizers.restore(
        names, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    )
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(tensors[f"model.{name}"])
            ema[name].copy_(tensors[f"ema.{name}"])
    return int(tensors["step"])
