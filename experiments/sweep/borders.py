"""Whether the best of a sweep lies on the border of its space: then better may lie beyond."""

import math
from typing import Any, Literal

from alignlab.config.run import check_blocks
from alignlab.errors import UserError
from alignlab.experiments.report.formatting import format_number
from alignlab.experiments.sweep.config import (
    BlocksSpace,
    CategoricalSpace,
    FloatSpace,
    IntSpace,
    Parameter,
    SweepConfig,
)
from alignlab.experiments.sweep.space import apply_values, num_blocks_of

End = Literal["lower", "upper"]

NEAR = 0.05
"""Share of a range, at each end, that counts as its border: draws of a number never hit the end."""


def border(config: SweepConfig, key: str, value: Any) -> End | None:
    """The end of a setting's range at which a value lies.

    Args:
        config: the sweep.
        key: of its space.
        value: of the recipe.

    Returns:
        None inside the range, of values without an order, and where the range cannot be wider: the
        setting takes nothing beyond (a first block, a weight of 0).
    """
    parameter = config.space[key]
    end = _end(parameter, value)
    if end is None or not _takes(config, key, _beyond(parameter, end)):
        return None
    return end


def shown_range(parameter: Parameter) -> str:
    """What is searched, in words.

    >>> shown_range(FloatSpace(kind="float", low=0.05, high=5.0, log=True))
    '0.05 to 5 (log)'
    """
    match parameter:
        case FloatSpace() | IntSpace():
            notes = ["log"] if parameter.log else []
            if parameter.step not in (None, 1):
                notes.append(f"step {parameter.step:g}")
            note = f" ({', '.join(notes)})" if notes else ""
            return f"{parameter.low:g} to {parameter.high:g}{note}"
        case CategoricalSpace():
            return f"one of {', '.join(map(shown_choice, parameter.choices))}"
        case BlocksSpace(choose="single"):
            return f"one block, {parameter.first} to {parameter.last}"
        case BlocksSpace():
            what = "neighbours" if parameter.choose == "range" else "blocks"
            most = parameter.max_size or parameter.count
            return f"up to {most} {what}, {parameter.first} to {parameter.last}"


def shown_choice(value: Any) -> str:
    """A value of the recipe, in words."""
    if isinstance(value, float):
        return format_number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _end(parameter: Parameter, value: Any) -> End | None:
    match parameter:
        case FloatSpace() | IntSpace():
            if parameter.low == parameter.high:
                return None
            low, high, place = (float(x) for x in (parameter.low, parameter.high, value))
            if parameter.log:
                low, high, place = math.log(low), math.log(high), math.log(place)
            drawn_anywhere = isinstance(parameter, FloatSpace) and parameter.step is None
            near = NEAR * (high - low) if drawn_anywhere else 0.0
            return "lower" if place <= low + near else "upper" if place >= high - near else None
        case BlocksSpace():
            if parameter.count == 1:
                return None
            is_lower, is_upper = parameter.first in value, parameter.last in value
            return None if is_lower == is_upper else "lower" if is_lower else "upper"
        case CategoricalSpace():
            return None


def _beyond(parameter: Parameter, end: End) -> Any:
    """A value that a wider range would have."""
    is_lower = end == "lower"
    match parameter:
        case BlocksSpace():
            return [parameter.first - 1 if is_lower else parameter.last + 1]
        case FloatSpace(low=low, high=high, log=True):
            return low / 2 if is_lower else high * 2
        case FloatSpace(low=low, high=high):
            return low - (high - low) / 10 if is_lower else high + (high - low) / 10
        case IntSpace(low=low, high=high):
            return low - 1 if is_lower else high + 1
    raise TypeError(parameter)


def _takes(config: SweepConfig, key: str, value: Any) -> bool:
    try:
        run = apply_values(config.base, {key: value})
        num_blocks = num_blocks_of(config.base)
        if num_blocks is not None:
            check_blocks(run, num_blocks)
    except UserError:
        return False
    return True
