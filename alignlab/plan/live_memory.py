"""Bytes of live tensors, by what made them: of real tensors, and of fake ones that hold no values.

Counted is what operations give and what is told (`hold`), each storage once, from when it is made
to when it dies. Temporaries inside an operation (a kernel's workspace, a custom operation's own
tensors) are not seen, nor is what an allocator adds by rounding and fragmentation.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignlab.plan.fake_values import tensors_in


@dataclass(frozen=True)
class Peak:
    """The most that was alive.

    Args:
        total: bytes.
        when: part that was running.
        by_label: bytes by label.
    """

    total: int = 0
    when: str = ""
    by_label: dict[str, int] = field(default_factory=dict)


class LiveMemory(TorchDispatchMode):
    """Follows storages of tensors while it is entered, and those that it was told of.

    Args:
        part: names what is running, which labels what it makes.
    """

    def __init__(self, part: Callable[[], str] = lambda: "all") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._part = part
        self._numbers: dict[int, int] = {}  # of the live storages, by address
        self._sizes: list[int] = []
        self._labels: list[str] = []
        self._parts: list[str] = []
        self._events: list[int] = []  # number of a storage that is made, or its complement: it dies
        self._start = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in((out,)):
            self._see(tensor)
        return out

    def hold(self, label: str, tensors: Iterable[Tensor | None]) -> None:
        """Labels storages, whoever made them; None and what has none are passed over."""
        for tensor in tensors:
            if tensor is not None:
                self._labels[self._see(tensor)] = label

    def pass_over(self, tensors: Iterable[Tensor]) -> None:
        """Counts storages as nothing: they are the host's, where a step has copies of them."""
        for tensor in tensors:
            self._sizes[self._see(tensor)] = 0

    def start(self) -> None:
        """The peak is that of what follows."""
        self._start = len(self._events)

    def live(self) -> int:
        """Bytes that are alive."""
        return sum(self._sizes[number] for number in self._numbers.values())

    def standing(self) -> dict[str, int]:
        """Bytes that are alive, by label."""
        found: dict[str, int] = {}
        for number in self._numbers.values():
            label = self._labels[number]
            found[label] = found.get(label, 0) + self._sizes[number]
        return found

    def peak(self) -> Peak:
        """The most that was alive since `start`, or since the beginning."""
        return self.peaks(frozenset())[0]

    def peaks(self, divided: frozenset[str]) -> list[Peak]:
        """The most that was alive, and what else may be the most where some of it is divided.

        Args:
            divided: labels of what several devices share.

        Returns:
            The highest first. However many devices share, one of them is the highest then.
        """
        whole = part = 0
        times: list[tuple[int, int, int]] = []  # bytes that are whole, divided, and when
        for index, event in enumerate(self._events):
            number = event if event >= 0 else ~event
            size = self._sizes[number] if event >= 0 else -self._sizes[number]
            if self._labels[number] in divided:
                part += size
            else:
                whole += size
            if index >= self._start - 1 and whole + part:
                times.append((whole, part, index))
        found = [self._at(place) for *_, place in _highest(times)]
        return sorted(found, key=lambda peak: -peak.total) or [Peak()]

    def _at(self, place: int) -> Peak:
        """What is alive after an event."""
        alive: set[int] = set()
        for event in self._events[: place + 1]:
            if event >= 0:
                alive.add(event)
            else:
                alive.remove(~event)
        by_label: dict[str, int] = {}
        for number in alive:
            label = self._labels[number]
            by_label[label] = by_label.get(label, 0) + self._sizes[number]
        when = self._parts[max(0, self._events[place])]
        return Peak(sum(by_label.values()), when, by_label)

    def _see(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        number = self._numbers.get(address)
        if number is None:
            number = len(self._sizes)
            part = self._part()
            self._numbers[address] = number
            self._sizes.append(storage.nbytes())
            self._labels.append(part)
            self._parts.append(part)
            self._events.append(number)
            weakref.finalize(storage, self._forget, address).atexit = False
        return number

    def _forget(self, address: int) -> None:
        self._events.append(~self._numbers.pop(address))


def _highest(times: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those that have the highest `whole + part / n` for some n of at least 1: a convex hull."""
    hull: list[tuple[int, int, int]] = []
    most = -1
    # by falling `whole`, the first of equals; only what has more in parts than all before
    for time in sorted(times, key=lambda time: (-time[0], -time[1], time[2])):
        if time[1] <= most:
            continue
        most = time[1]
        while len(hull) > 1 and _gain(hull[-2], time) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(time)
    while len(hull) > 1 and sum(hull[-1][:2]) <= sum(hull[-2][:2]):
        hull.pop()  # lower than another one even if nothing is divided
    return hull


def _gain(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """Bytes in parts that the other time has more, for each whole byte that it has less."""
    return (other[1] - one[1]) / (one[0] - other[0])
