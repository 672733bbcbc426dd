"""Steps of a real run, measured by what a plan measures fake ones with, and torch's counter."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from alignlab.config.run import RunConfig
from alignlab.plan.fake_step import OPTIMIZER, follow_step, hold_run
from alignlab.plan.live_memory import LiveMemory, Peak
from alignlab.plan.parts import Parts
from alignlab.train import RunTrainer
from alignlab.training.setup import build_run


def measured_steps(config: RunConfig) -> tuple[Peak, dict[str, int], RunTrainer]:
    """Takes a step, and measures the same one again.

    Args:
        config: of the run.

    Returns:
        The peak of the second step, bytes by label that stay after it, and the trainer: its run's
        clips are encoded, its branch is not entered.
    """
    run, parts = build_run(config), Parts()
    trainer, live = RunTrainer(run), LiveMemory(parts.now)
    hold_run(live, run)
    with run.branch:
        trainer.step(list(trainer.micro_batches()))  # which encodes the clips
        run.state.step = 0
        live.hold(OPTIMIZER, _state_of(trainer))
        follow_step(live, run.state, parts)
        live.start()
        with live:
            trainer.step(trainer.micro_batches())
    run.state.step = 0
    return live.peak(), live.standing(), trainer


def attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))


def attention_backward(
    grad: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *_: object,
    **__: object,
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


ON_CPU = {  # which torch has formulas for on CUDA alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def _state_of(trainer: RunTrainer) -> Iterator[Tensor]:
    for state in trainer.state.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
