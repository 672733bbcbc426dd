"""One dataset cache for the runs of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from alignlab.config.data import CacheConfig
from alignlab.dataset_cache import encoded_values


@pytest.fixture(scope="module")
def shared_clips(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All runs of a file, whatever their output, read what one of them encoded.

    For files whose tests look at no cache, and change neither clips nor encoders behind its keys.
    """
    folder = tmp_path_factory.mktemp("shared-clips")
    named = encoded_values.cache_path

    def shared(config: CacheConfig, output: str) -> Path:
        return folder if config.path is None else named(config, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded_values, "cache_path", shared)
        yield
