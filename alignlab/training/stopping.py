"""Checkpoints that no step number asks for: a signal came, or `checkpoint.every_minutes` passed."""

import time
from typing import NamedTuple

from alignlab import interruption
from alignlab.config.parts import CheckpointConfig
from alignlab.distributed.ranks import Ranks


class Due(NamedTuple):
    """What is to be done after a step.

    Args:
        signal: that ends the training; 0 for none.
        checkpoint: whether one is to be written, by the clock or before the end.
    """

    signal: int
    checkpoint: bool


class Stopping:
    """Looks at the clock and at signals, on behalf of all ranks.

    Args:
        config: `every_minutes` is read.
        ranks: of the training.
    """

    def __init__(self, config: CheckpointConfig, ranks: Ranks) -> None:
        self._minutes = config.every_minutes
        self._ranks = ranks
        self.saved()

    def saved(self) -> None:
        """A checkpoint was written, or the loop begins."""
        self._since = time.monotonic()

    def due(self) -> Due:
        """The same on all ranks, also where a signal has reached one of them.

        The clock is that of rank 0.
        """
        passed = time.monotonic() - self._since
        by_time = self._minutes is not None and passed >= 60 * self._minutes
        asks = (interruption.asked(), int(by_time and self._ranks.is_main))
        signal, due = self._ranks.largest(asks)
        return Due(signal, bool(signal or due))
