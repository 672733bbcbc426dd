"""What happens around the optimizer step: learning rate and moving average."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from alignlab import interruption
from alignlab.config.parts import TrainingConfig
from alignlab.distributed.sharding import local_part, scale_gradients, total_norm
from alignlab.runs.prolong import SchedulePlan
from alignlab.training.checkpoint import RunState, copy_weights


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, plan: SchedulePlan, step: int
) -> None:
    """The learning rate of a step is a function of the step alone, so nothing is saved of it."""
    for group in optimizer.param_groups:
        group["lr"] = config.optim.lr * lr_scale(config, step, plan.total_steps(step))


def lr_scale(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Warm-up from 0, then constant, or down to 0 along a line or half a cosine.

    Args:
        config: `optim` is read.
        step: 0-based.
        total_steps: at which 0 is reached.
    """
    optim = config.optim
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(1, total_steps - optim.warmup)
    if optim.schedule == "linear":
        return 1 - done
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float | None) -> Tensor:
    """Scales the gradient down to a norm of `largest`, in place.

    Args:
        parameters: those whose gradients are one vector.
        largest: None leaves the gradient as it is.

    Returns:
        The norm before.
    """
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        scale_gradients(parameters, largest, norm)
    return norm


def step_unless(optimizer: torch.optim.Optimizer, is_broken: Tensor) -> None:
    """Takes the optimizer's step, unless `is_broken`, a bool on the device; then nothing changes.

    The fused kernel asks the device, and the host does not wait.
    """
    optimizer.found_inf = is_broken.float()  # type: ignore[attr-defined]  # as GradScaler does
    optimizer.step()


def update_ema(state: RunState, decay: float | None) -> None:
    """Moves the average towards the trained weights."""
    if state.ema is not None and decay is not None:
        move_average(state.ema, state.transformer, decay)


@torch.no_grad()
def move_average(average: dict[str, Tensor], transformer: nn.Module, decay: float) -> None:
    """Moves an average of parameters, by their names, towards them, in place."""
    trained = dict(transformer.named_parameters())
    parameters = [local_part(trained[name]) for name in average]
    torch._foreach_lerp_([local_part(a) for a in average.values()], parameters, 1 - decay)


@contextmanager
def averaged_weights(state: RunState) -> Iterator[None]:
    """Puts the moving average, if there is one, in place of the trained weights for a while.

    A signal may come between any two lines. What is saved then are the trained weights: the state
    knows that they are put aside.
    """
    if state.ema is None:
        yield
        return
    parameters = dict(state.transformer.named_parameters())
    trained = {name: parameters[name].detach().clone() for name in state.ema}
    try:
        with interruption.held():
            state.put_aside = trained
            copy_weights(state.ema, state.transformer)
        yield
    finally:
        state.put_back()
