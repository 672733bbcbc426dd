"""What an entry of the dataset cache is of. Light: settings and `--help` read it."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, get_args

Kind = Literal["text", "video", "reference", "teacher"]
Mode = Literal["off", "read", "write", "require"]
StorageDtype = Literal["fp32", "bf16", "fp8", "int8"]
Part = str | int | float | bool | tuple["Part", ...]

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class CacheKey:
    """Names a value by all that it depends on.

    Args:
        kind: what it is of.
        parts: flat and readable, so that an entry and a miss can be explained. Two keys are equal
            where kind and parts are: `1`, `1.0`, `True` and `"1"` differ.
        is_exact: kept as it is, whatever dtype features of teachers are stored in.

    Raises:
        TypeError: a part is none of the types.
        ValueError: a number is not finite.
    """

    kind: Kind
    parts: Mapping[str, Part]
    is_exact: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TypeError(f"no kind of entry: {self.kind!r}")
        for name, part in self.parts.items():
            _check(name, part)
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of kind and parts."""
        return digest_of(self.kind, self.parts)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheKey) and self.digest == other.digest


def digest_of(kind: str, parts: Mapping[str, object]) -> str:
    """SHA-256 of the canonical JSON of a kind and its parts."""
    plain = json.dumps([kind, dict(parts)], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def _check(name: object, part: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"no name of a part: {name!r}")
    if isinstance(part, tuple):
        for one in part:
            _check(name, one)
    elif type(part) not in (str, int, float, bool):
        raise TypeError(f"{name}: a part is a str, int, float, bool or a tuple of these: {part!r}")
    elif isinstance(part, float) and not math.isfinite(part):
        raise ValueError(f"{name}: {part} is not finite")
