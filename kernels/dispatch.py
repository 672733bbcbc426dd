"""What every operation here says of its implementations, in the same words."""

from collections.abc import Collection
from typing import Literal, get_args

Impl = Literal["auto", "eager", "chunked", "triton"]


def available(present: Collection[str]) -> dict[str, str | None]:
    """Lists every implementation by name, with the reason it cannot run here or None if it can."""
    names = [name for name in get_args(Impl) if name != "auto"]
    return {name: None if name in present else "not in this version" for name in names}


def require(operation: str, impl: str, present: Collection[str]) -> None:
    """Refuses an implementation that the operation does not have.

    Raises:
        ValueError: it is not in `present`.
    """
    if impl not in present:
        known = ", ".join(["auto", *present])
        raise ValueError(f"{operation} has no implementation {impl!r}; this version has: {known}")
