"""A frozen model that is in memory only where something uses it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        """The model on its device; within another use of it, it stays there.

        Raises:
            UserError: its files cannot be used.
        """
        with ENCODING:
            model = self.loaded()
            if self._is_parked and not self._users:
                model.to(self._device)
            self._users += 1
            try:
                yield model
            finally:
                self._users -= 1
                if self._is_parked and not self._users:
                    model.to(CPU)

    def free(self) -> None:
        """Gives its memory back; it is loaded again when it is next used."""
        with ENCODING:
            self._model = None
