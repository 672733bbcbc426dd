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
    norm = _norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        scale_gradients(parameters, largest, norm)
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all gradients, in fp32 whatever they are kept in."""
    if all(_is_fp32(gradient) for gradient in gradients):
        return total_norm(gradients)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def step_unless(optimizer: torch.optim.Optimizer, is_broken: Tensor) -> None:
    """Takes the optimizer's step, unless `is_broken`, a bool on the device; then nothing changes.

    Every optimizer of `build_optimizer` asks the device, and the host does not wait.
    """
    optimizer.found_inf = is_broken.float()  # type: ignore[attr-defined]  # as GradScaler does
    optimizer.step()


def update_ema(state: RunState, decay: float | None) -> None:
    """Moves the average towards the trained weights."""
    if state.ema is not None and decay is not None:
        move_average(state.ema, state.transformer, decay)


@torch.no_grad()
def move_average(average: dict[str, Tensor], transformer: nn.Module, decay: float) -> None:
    """Moves an average of parameters, by their names and in fp32, towards them, in place."""
    trained = dict(transformer.named_parameters())
    fp32 = [name for name in average if _is_fp32(trained[name])]
    parameters = [local_part(trained[name]) for name in fp32]
    if fp32:
        torch._foreach_lerp_([local_part(average[name]) for name in fp32], parameters, 1 - decay)
    for name in average.keys() - set(fp32):  # one at a time: each is widened for it
        average[name].lerp_(trained[name].float(), 1 - decay)


def fp32_copy(parameter: nn.Parameter) -> Tensor:
    """What a moving average begins with: in bf16 its steps would be lost."""
    return parameter.detach().to(torch.float32, copy=True)


def _is_fp32(value: Tensor) -> bool:
    return value.dtype == torch.float32


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
