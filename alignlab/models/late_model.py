"""A frozen model that is in memory only where something uses it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import nn

from alignlab.dataset_cache.encoded_values import ENCODING

Model = TypeVar("Model", bound=nn.Module)

CPU = torch.device("cpu")


class LateModel(Generic[Model]):
    """Loads a frozen model when it is first used, and moves it to its device to be used there.

    One thread at a time uses it.

    Args:
        load: loads it, and refuses files that cannot be used.
        device: where it computes.
        is_parked: it goes back to the CPU after each use, and its device has room for others.

    Attributes:
        num_loads: how often it was loaded.
    """

    def __init__(
        self, load: Callable[[], Model], device: torch.device, *, is_parked: bool = False
    ) -> None:
        self._load = load
        self._device = device
        self._is_parked = is_parked and device.type != "cpu"
        self._model: Model | None = None
        self._users = 0
        self._counting = Lock()
        self._is_moved = False  # to its device, from where it is parked
        self.num_loads = 0

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory."""
        return self._model is not None

    def loaded(self) -> Model:
        """The model, loaded now if it is not; on the CPU while it is parked.

        Raises:
            UserError: its files cannot be used.
        """
        with ENCODING:
            if self._model is None:
                model = self._load()
                self.num_loads += 1
                self._model = model if self._is_parked else model.to(self._device)
            return self._model

    @contextmanager
    def in_use(self) -> Iterator[Model]:
        """The model on its device; within another use of it, and while it is held, it stays there.

        Raises:
            UserError: its files cannot be used.
        """
        with ENCODING, self.held():
            model = self.loaded()
            if self._is_parked and not self._is_moved:
                model.to(self._device)
                self._is_moved = True
            yield model

    @contextmanager
    def held(self) -> Iterator[None]:
        """Once it is used within this, the model stays on its device; nothing is loaded for it.

        Threads may hold it at once; it is parked when the last one ends.
        """
        with self._counting:  # not for as long as another thread encodes
            self._users += 1
        try:
            yield
        finally:
            with self._counting:
                self._users -= 1
            self._park()

    def free(self) -> None:
        """Gives its memory back, also to the device; it is loaded again when it is next used."""
        with ENCODING:
            if self._model is None:
                return
            self._model, self._is_moved = None, False
            gc.collect()  # modules may refer to each other in a circle
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _park(self) -> None:
        if self._users or not self._is_moved:
            return
        with ENCODING:
            if self._is_moved and not self._users and self._model is not None:
                self._model.to(CPU)
                self._is_moved = False
