"""Where a sweep searches the settings of an objective, unless its recipe says otherwise.

A config says it in `ObjectiveConfig.search_space`, by the names of its own settings. Blocks are
given as shares of the transformer's depth, since papers choose them for models of other depths.
"""

import math
from dataclasses import dataclass
from typing import Any

_ROUNDING = 1e-9


@dataclass(frozen=True)
class NumberRange:
    """A number from `low` to `high`, whole where both are whole; `log`: by its logarithm."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """One of several values without an order."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class DepthRange:
    """Blocks of a part of the depth. Block i of n lies at depth (i + 1) / n, as papers count.

    Args:
        above: depth that all blocks lie above.
        up_to: depth that no block lies above.
        most: neighbours of at most this share of all blocks, at least one; None: a single block.
    """

    above: float = 0.0
    up_to: float = 1.0
    most: float | None = None

    def blocks(self, num_blocks: int) -> range:
        """The blocks to choose from, 0-based; empty where none lies there."""
        first = math.floor(self.above * num_blocks + _ROUNDING)
        return range(first, math.floor(self.up_to * num_blocks + _ROUNDING))

    def longest(self, num_blocks: int) -> int:
        """How many blocks may be chosen at once."""
        most = 1 if self.most is None else math.floor(self.most * num_blocks + _ROUNDING)
        return max(1, min(most, len(self.blocks(num_blocks))))


SearchRange = NumberRange | Choice | DepthRange

SHALLOW = DepthRange(up_to=0.5)
DEEP = DepthRange(above=0.5)
"""Halves of the depth, for objectives that compare a block with a deeper one: every pair fits."""


def tenfold(default: float) -> NumberRange:
    """From a tenth to ten times a positive default, by the logarithm."""
    low, high = (float(f"{default * factor:.6g}") for factor in (0.1, 10.0))
    return NumberRange(low, high, log=True)
