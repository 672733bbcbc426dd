"""The micro-batches of a step, each made when it is taken."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

Made = TypeVar("Made")


class MicroBatches(Generic[Made]):
    """A rank's share of a step's samples, so that no two micro-batches need to be in memory.

    Each iteration makes them anew.

    Args:
        makers: each makes one, on the device.
        making: entered whenever one is made.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], Made]],
        making: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._makers = makers
        self._making = making

    def within(self, making: Callable[[], AbstractContextManager[None]]) -> "MicroBatches[Made]":
        """The same ones, made within what `making` gives."""
        return MicroBatches(self._makers, making)

    def __len__(self) -> int:
        return len(self._makers)

    def __iter__(self) -> Iterator[Made]:
        for make in self._makers:
            yield self._made(make)  # in no variable: the taker alone keeps it alive

    def _made(self, make: Callable[[], Made]) -> Made:
        with self._making():
            return make()
