"""Which part of a training step an operation belongs to, also in the backward pass.

Forward, a part begins and ends where a module does. Backward, each autograd node carries the number
that it got when it was made, so that it belongs to the part that was running then. What runs with
gradients on inside the backward pass is a checkpointed block that is computed again.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

REST = "rest"
"""What no part names: noise, the flow loss, norms of gradients."""
GRADIENTS = "gradients"
RECOMPUTATION = "recomputation"
BACKWARD = ", backward"
_LEAF = 2**64 - 1  # the number of every node that accumulates a gradient


class Parts:
    """Says at any time what is running.

    With `within` or `follow`, parts are named; innermost wins.
    """

    def __init__(self) -> None:
        self._open = [REST]
        self._numbers = [0]
        self._named = [REST]

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What runs inside is that part."""
        self.begin(part)
        try:
            yield
        finally:
            self.end()

    def follow(self, module: nn.Module, part: Callable[[], str]) -> None:
        """What a module's forward pass runs is that part; asked at each call."""

        def begin(*_: Any) -> None:
            self.begin(part())

        def end(*_: Any) -> None:
            self.end()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end, always_call=True)

    def now(self) -> str:
        """The part that the operation which runs now belongs to."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._open[-1]
        if torch.is_grad_enabled():
            return RECOMPUTATION
        number = node._sequence_nr()
        if number == _LEAF:
            return GRADIENTS
        return self._named[bisect_right(self._numbers, number) - 1] + BACKWARD

    def begin(self, part: str) -> None:
        self._open.append(part)
        self._mark()

    def end(self) -> None:
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._named.append(self._open[-1])
