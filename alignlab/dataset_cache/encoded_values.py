"""What frozen models make of clips: read from the dataset cache, or made and kept there.

Values are fp32. One that bf16 holds exactly, as what a model in bf16 gives, is kept in half the
bytes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import RLock
from typing import Self

import torch
from torch import Tensor

from alignlab.config.data import CacheConfig
from alignlab.config.paths import user_path
from alignlab.dataset_cache.key import CacheKey, Kind
from alignlab.dataset_cache.store import DatasetCache
from alignlab.errors import UserError

Tensors = dict[str, Tensor]

ENCODING = RLock()
"""Held by a frozen model while it works or is loaded: the runs of a process share models, threads
make batches, and the autoencoder keeps what it has seen of a clip until it is through."""


class EncodedValues:
    """The dataset cache as a run uses it; threads may share it.

    Args:
        cache: where values are kept.
        kinds: those that are; others are made each time.
    """

    def __init__(self, cache: DatasetCache, kinds: frozenset[Kind]) -> None:
        self.cache = cache
        self._kinds = kinds if cache.mode != "off" else frozenset[Kind]()

    @classmethod
    def of(cls, config: CacheConfig, output: str) -> Self:
        """As `data.cache` says, of runs in the folder `output`.

        Raises:
            UserError: the folder cannot be a cache, or a run or several lie there.
        """
        path = cache_path(config, output)
        if config.mode != "off":
            _refuse_of_runs(path)
        return cls(DatasetCache(path, config.mode, config.dtype), kept_kinds(config))

    def keeps(self, kind: Kind) -> bool:
        """Whether values of this kind are read and kept."""
        return kind in self._kinds

    def get(
        self,
        kind: Kind,
        key: Callable[[], CacheKey],
        make: Callable[[], Tensors],
        refusal: Callable[[], str],
    ) -> Tensors:
        """A value: on the CPU if its kind is kept, else where it was made.

        Args:
            kind: of it.
            key: names it; not asked for a kind that is not kept.
            make: computes it, fp32. What it raises is not kept.
            refusal: the message where something that was made is not finite.

        Raises:
            UserError: it is not there, and `require` says that it has to be; or what was made is
                not finite. Features that are not kept are not looked at here: the step that reads
                them says so.
        """
        if not self.keeps(kind):
            made = make()
            if kind != "teacher":  # on a GPU a look at each step would wait for it
                _check_finite(made, refusal)
            return made
        named = key()
        found = self.cache.read(named)
        if found is None:
            made = {name: tensor.detach().cpu() for name, tensor in make().items()}
            _check_finite(made, refusal)
            is_exact = kind != "teacher" or named.is_exact or self.cache.dtype == "fp32"
            found = self.cache.write(named, _narrowed(made) if is_exact else made)
        return {name: _widened(tensor) for name, tensor in found.items()}

    def lacks(self, key: CacheKey) -> bool:
        """Whether a value of a kind that is kept is not there yet."""
        return self.keeps(key.kind) and not self.cache.has(key)

    def flush(self) -> None:
        """Returns when all that was made is on the disk."""
        self.cache.flush()


def kept_kinds(config: CacheConfig) -> frozenset[Kind]:
    """The kinds of values that `data.cache` says are kept, where there is a cache."""
    kept: dict[Kind, bool] = {
        "text": config.texts,
        "video": config.latents,
        "reference": config.latents,
        "teacher": config.teachers,
    }
    return frozenset(kind for kind in kept if kept[kind])


def cache_path(config: CacheConfig, output: str) -> Path:
    """The folder of the cache that runs in the folder `output` share."""
    return user_path(output) / "cache" if config.path is None else user_path(config.path)


def _check_finite(tensors: Mapping[str, Tensor], refusal: Callable[[], str]) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(refusal())


def _refuse_of_runs(path: Path) -> None:
    """An older version let a run or a comparison be named `cache`."""
    for name in ("recipe.yaml", "comparison.json", "progress.json"):
        if (path / name).exists():
            raise UserError(
                f"{path} holds {name} of a run, a comparison or a sweep, so it can be no cache: "
                "rename that folder, or name another as data.cache.path"
            )


def _narrowed(tensors: Mapping[str, Tensor]) -> Tensors:
    """In bf16 what is then the same, bit for bit."""
    narrow = {}
    for name, tensor in tensors.items():
        short = tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 else tensor
        narrow[name] = short if _same_bits(short, tensor) else tensor
    return narrow


def _same_bits(short: Tensor, tensor: Tensor) -> bool:
    if short.dtype == tensor.dtype:
        return True
    return torch.equal(short.float().view(torch.int32), tensor.contiguous().view(torch.int32))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
