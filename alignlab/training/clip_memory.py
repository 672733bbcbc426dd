"""Encoded clips kept in memory, the least recently used ones dropped first."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

from torch import Tensor

from alignlab.units import GIB

MEMORY_BYTES = GIB
"""Of the tensors that a run keeps of each split: ten clips of 81 frames of 480x832 with their
pixels (97 MB each), or fifty without."""

ATTACHED_SHARE = 4
"""Features of one clip that take more than this fraction of the memory are not kept in it."""

Clip = TypeVar("Clip")
Value = TypeVar("Value")


@dataclass(frozen=True)
class MadeOnce:
    """Values that belong to one clip, by name; each is made when it is first asked for."""

    values: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Value]) -> Value:
        """The value of that name, which `make` gives."""
        if name not in self.values:
            self.values[name] = make()
        value: Value = self.values[name]
        return value


class ClipMemory(Generic[Clip]):
    """Encoded clips by index. Encoding is deterministic, so that it changes no number.

    Threads may share it.

    Args:
        capacity: bytes of tensors. One clip alone may have more: it is kept until the next comes.
    """

    def __init__(self, capacity: int = MEMORY_BYTES) -> None:
        self._capacity = capacity
        self._clips: OrderedDict[int, tuple[Clip, int]] = OrderedDict()
        self._held = 0
        self._lock = Lock()

    def get(self, index: int) -> Clip | None:
        """The clip, if it is kept."""
        with self._lock:
            if index not in self._clips:
                return None
            clip, _ = self._clips[index]
            self._keep(index, clip)  # the last used one
            return clip

    def put(self, index: int, clip: Clip) -> None:
        """Keeps a clip, and drops the least recently used ones beyond the capacity."""
        with self._lock:
            self._keep(index, clip)

    def grow(self, index: int, num_bytes: int) -> None:
        """Counts what a clip is about to hold beside what it held when it was put or got last.

        Of a clip that is not kept, nothing: it is counted as it is when it is put.
        """
        with self._lock:
            if index in self._clips:
                clip, size = self._clips[index]
                self._clips[index] = (clip, size + num_bytes)
                self._held += num_bytes
                self._drop()

    def has_room(self, num_bytes: int) -> bool:
        """Whether a clip may hold features of that size once they were read."""
        return num_bytes * ATTACHED_SHARE <= self._capacity

    def _keep(self, index: int, clip: Clip) -> None:
        _, before = self._clips.pop(index, (clip, 0))
        size = tensor_bytes(clip)
        self._clips[index] = (clip, size)
        self._held += size - before
        self._drop()

    def _drop(self) -> None:
        while self._held > self._capacity and (len(self._clips) > 1 or not self._capacity):
            _, (_, dropped) = self._clips.popitem(last=False)
            self._held -= dropped


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in a value, in mappings, sequences and dataclasses too.

    >>> import torch
    >>> tensor_bytes({"a": torch.zeros(2, 3), "b": [torch.zeros(4, dtype=torch.uint8)]})
    28
    """
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, list(value.values())))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    if is_dataclass(value):
        return tensor_bytes(vars(value))  # also what it holds beside its fields, such as pixels
    return 0
