"""Checkpoints that no step number asks for: a signal came, or `checkpoint.every_minutes` passed."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from alignlab import interruption
from alignlab.config.parts import TrainingConfig
from alignlab.distributed.ranks import Ranks
from alignlab.runs.checkpoint_folders import step_of
from alignlab.training.checkpoint import TrainState


class Due(NamedTuple):
    """What is to be done after a step.

    Args:
        signal: that ends the training; 0 for none.
        in_turn: whether a checkpoint is to be written because of the step's number.
        checkpoint: whether one is to be written, for that, by the clock or before the end.
        weights: whether a copy of the weights is.
    """

    signal: int
    in_turn: bool
    checkpoint: bool
    weights: bool

    @property
    def saves(self) -> bool:
        """Whether something is to be written."""
        return self.checkpoint or self.weights


class Stopping:
    """Looks at the clock and at signals, on behalf of all ranks.

    Args:
        config: of the training.
        ranks: of the training.
        state: of the training.
    """

    def __init__(self, config: TrainingConfig, ranks: Ranks, state: TrainState) -> None:
        self._config = config
        self._ranks = ranks
        self._state = state
        self.saved(None)

    def saved(self, newest: Path | None) -> None:
        """This checkpoint was written, or is the one that the training resumes from."""
        self.newest = newest
        self._since = time.monotonic()

    def due(self) -> Due:
        """The same on all ranks, also where a signal has reached one of them.

        The clock is that of rank 0.
        """
        settings, step = self._config.checkpoint, self._state.step
        minutes = settings.every_minutes
        by_time = minutes is not None and time.monotonic() - self._since >= 60 * minutes
        asks = (interruption.asked(), int(by_time and self._ranks.is_main))
        number, due = self._ranks.largest(asks)
        in_turn = step == self._config.steps or step % settings.every == 0
        weights = settings.weights_every is not None and step % settings.weights_every == 0
        return Due(number, in_turn, bool(number or due or in_turn), weights)

    def interrupted(self, due: Due) -> interruption.Interrupted:
        """What ends the training; rank 0 speaks for all."""
        return interruption.Interrupted(due.signal, told=not self._ranks.is_main)

    @contextmanager
    def between_steps(self, save: Callable[[], object]) -> Iterator[None]:
        """SIGTERM and SIGUSR1 stop what is done between two steps; it leaves the state as it is.

        Of several ranks, the others wait for rank 0 and know of no signal: there, it waits too.

        Args:
            save: writes the checkpoint of the last step, where it has none.
        """
        if self._ranks.world_size > 1:
            yield
            return
        try:
            with interruption.deferred(False):
                interruption.check()
                yield
        except interruption.Interrupted as stop:
            is_saved = self.newest is not None and step_of(self.newest) == self._state.step
            if stop.number != signal.SIGINT and not is_saved:
                save()
            raise

    def progress(self) -> str:
        """How far the training came, for the line of an interruption."""
        newest = self.newest
        kept = "no checkpoint yet" if newest is None else f"checkpoint at {step_of(newest)}"
        return f"after step {self._state.step} of {self._config.steps} ({kept})"
