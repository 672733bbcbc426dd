"""Clips kept in memory after the frozen models have seen them."""

from collections import OrderedDict
from typing import Generic, TypeVar

Clip = TypeVar("Clip")


class ClipCache(Generic[Clip]):
    """Encoded clips by index, least recently used dropped first.

    Encoding is deterministic, so a cache changes no number.

    Args:
        capacity: how many are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._clips: OrderedDict[int, Clip] = OrderedDict()

    def get(self, index: int) -> Clip | None:
        """The clip, if it is kept."""
        if index not in self._clips:
            return None
        self._clips.move_to_end(index)
        return self._clips[index]

    def put(self, index: int, clip: Clip) -> None:
        """Keeps a clip, and drops the least recently used ones beyond the capacity."""
        self._clips[index] = clip
        while len(self._clips) > self._capacity:
            self._clips.popitem(last=False)
