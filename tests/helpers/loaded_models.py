"""Which frozen models a process has loaded, and which of them are still in memory."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest
from diffusers import AutoencoderKLWan
from transformers import Dinov2Model, UMT5EncoderModel

TEXT, VAE, TEACHER = MODELS = (UMT5EncoderModel, AutoencoderKLWan, Dinov2Model)


class LoadedModels:
    """Models by the name of their class.

    Attributes:
        counts: how many were constructed.
    """

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self._models: list[weakref.ref[Any]] = []

    def alive(self) -> set[str]:
        """Those that are in memory."""
        gc.collect()
        return {type(model).__name__ for ref in self._models if (model := ref()) is not None}

    def add(self, model: Any) -> None:
        self.counts[type(model).__name__] += 1
        self._models.append(weakref.ref(model))


@pytest.fixture
def loaded_models() -> Iterator[LoadedModels]:
    """Those that are constructed from here on."""
    loaded = LoadedModels()
    with pytest.MonkeyPatch.context() as patch:
        for model_class in MODELS:

            @wraps(model_class.__init__)  # diffusers reads its signature
            def construct(
                self: object, *args: object, made: Any = model_class.__init__, **kwargs: object
            ) -> None:
                loaded.add(self)
                made(self, *args, **kwargs)

            patch.setattr(model_class, "__init__", construct)
        yield loaded
