"""How large a setting may be, with the reason.

A number that is a slip of the keyboard (`steps=1e30`) would otherwise show itself hours later, as
an overflow, as a run that never ends, or not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import AfterValidator, BaseModel

from alignlab.errors import printable, shown

MAX_WHOLE = 2**53
MAX_NUMBER = 1e12

SEEDS = (2**32 - 1, "NumPy and Optuna take seeds of 32 bits")
STEPS = (10**9, "no training has that many steps")
BATCH = (8192, "the samples of a step are drawn together and listed in memory")
SHIFT = (1000.0, "every noise level would be pure noise")


def at_most(limit: float, why: str) -> AfterValidator:
    """For `Annotated[int, at_most(8192, "...")]`: refuses more, and says why."""

    def check(value: Any) -> Any:
        if value > limit:
            raise ValueError(f"{_short(value)} is more than {_short(limit)}: {why}")
        return value

    return AfterValidator(check)


def refuse_unusable(value: Any) -> None:
    """Refuses numbers that no setting can mean and texts of which nothing can be named.

    Infinity passes: some settings allow it, and pydantic refuses it in all others.

    Args:
        value: a setting, of any depth.

    Raises:
        ValueError: one line.
    """
    for leaf in _leaves(value):
        if isinstance(leaf, str):
            if printable(leaf) != leaf:
                raise ValueError(f"{shown(leaf)} holds a line break or a control character")
        elif isinstance(leaf, int):
            if abs(leaf) > MAX_WHOLE:
                raise ValueError("a whole number beyond 2^53, which no setting can mean")
        elif MAX_NUMBER < abs(leaf) < float("inf"):
            raise ValueError(f"{leaf:g} is beyond {MAX_NUMBER:g}, which no setting can mean")


def _leaves(value: Any) -> Iterator[int | float | str]:
    if isinstance(value, int | float | str):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(key)
            yield from _leaves(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _leaves(inner)


def _short(number: float) -> str:
    return shown(number, 24) if isinstance(number, int) else f"{number:g}"
