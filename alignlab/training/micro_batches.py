"""The micro-batches of a step, each made when it is taken."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

Made = TypeVar("Made")


def _as_it_is(made: Made) -> Made:
    return made


@dataclass(frozen=True)
class MicroBatches(Generic[Made]):
    """A rank's share of a step's samples, so that no two micro-batches need to be in memory.

    Each iteration makes them anew.

    Args:
        makers: each makes one, on the CPU.
        move: copies one to the device.
        completed: adds to one what its step will read of it and else makes itself; used where it
            is made ahead of the step (`alignlab.training.prefetch`).
        making: entered whenever one is made and moved.
    """

    makers: Sequence[Callable[[], Made]]
    move: Callable[[Made], Made] = _as_it_is
    completed: Callable[[Made], Made] = _as_it_is
    making: Callable[[], AbstractContextManager[None]] = nullcontext

    def within(self, making: Callable[[], AbstractContextManager[None]]) -> "MicroBatches[Made]":
        """The same ones, made within what `making` gives."""
        return replace(self, making=making)

    def made_by(self, makers: Sequence[Callable[[], Made]]) -> "MicroBatches[Made]":
        """The same ones, made otherwise."""
        return replace(self, makers=makers)

    def makers_ahead(self) -> list[Callable[[], Made]]:
        """Make each with all that its step will read."""
        return [partial(self._complete, make) for make in self.makers]

    def __len__(self) -> int:
        return len(self.makers)

    def __iter__(self) -> Iterator[Made]:
        for make in self.makers:
            yield self._moved(make)  # in no variable: the taker alone keeps it alive

    def _moved(self, make: Callable[[], Made]) -> Made:
        with self.making():
            return self.move(make())

    def _complete(self, make: Callable[[], Made]) -> Made:
        return self.completed(make())
