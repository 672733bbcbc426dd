"""The loop that both kinds of training share: what is logged, what is saved, what stops it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from alignlab.config.run import RunConfig
from alignlab.progress import step_progress
from alignlab.stage1.checkpoint import Stage1State
from alignlab.stage1.config import Stage1Config
from alignlab.tracking import Tracker
from alignlab.training.checkpoint import TrainState
from alignlab.training.memory import PeakMemory
from alignlab.training.nonfinite import FiniteWatch
from alignlab.training.step_clock import StepClock

Data = TypeVar("Data")


def run_steps(
    config: RunConfig | Stage1Config,
    state: TrainState | Stage1State,
    device: torch.device,
    tracker: Tracker,
    memory: PeakMemory,
    found: Path | None,
    *,
    draw: Callable[[], Data],
    step: Callable[[Data], dict[str, Tensor]],
    save: Callable[[], Path],
    look: Callable[[Data], None] | None = None,
) -> None:
    """Trains from where `state` stands to the last step.

    Args:
        config: the recipe.
        state: moved on by `step`.
        device: where the training runs.
        tracker: gets the scalars of every logged step.
        memory: measures the peak.
        found: the checkpoint that `state` stands on, if any.
        draw: the data of the next step.
        step: one optimizer step; its scalars, still on the device.
        save: writes a checkpoint of `state`.
        look: sees the data of every step before it is taken; its time counts as none of the
            step's. It must leave `state` as it is.

    Raises:
        UserError: a scalar or a weight stopped being finite.
    """
    watch, clock, note = FiniteWatch(device), StepClock(device), ""
    with step_progress(config.name, total=config.steps, done=state.step) as advance:
        while state.step < config.steps:
            clock.step_begins()
            data = draw()
            clock.data_ready()
            if look is not None:
                with clock.paused():
                    look(data)
            scalars = step(data)
            done = state.step
            watch.check(done, scalars)
            saves = done == config.steps or done % config.checkpoint.every == 0
            if saves:
                # a finite loss says nothing of the weights that its step left behind
                watch.check(done, {"weights": get_total_norm(list(state.names))})
            if saves or done % config.tracking.log_every == 0:
                watch.raise_if_broken(found)
                values = {key: float(value) for key, value in scalars.items()}
                values |= clock.lap() | {"memory/peak_mib": memory.peak_mib()}
                tracker.log(done, values)
                note = f"loss {values['loss/total']:.4f}"
                if saves:
                    found = save()
                clock.restart()
            advance(done, note)
