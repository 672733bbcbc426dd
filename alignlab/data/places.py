"""Where entities are in the first frame of a clip, as rows of metadata and files of prompts say it.

    entities     phrases of the entities, in label order
    boxes        one per entity: [left, top, right, bottom] in pixels of the video, or null
    points       per entity a list of [x, y], on it, or [x, y, 0], beside it; or null
    first_mask   label image of the clip's first frame: 8-bit, 0 background, k the k-th entity

`alignlab data masks` makes masks of them; nothing else reads them.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from alignlab.errors import UserError

COLUMNS = ("boxes", "points", "first_mask")
"""Beside `entities`."""

Box = tuple[float, float, float, float]
Spot = tuple[float, float, bool]
"""x, y, and whether it is on the entity."""


@dataclass(frozen=True)
class Places:
    """What is said of the entities of a clip.

    Args:
        entities: their phrases.
        boxes: one per entity, or none at all.
        points: likewise.
        first_mask: as written.
    """

    entities: tuple[str, ...] = ()
    boxes: tuple[Box | None, ...] = ()
    points: tuple[tuple[Spot, ...], ...] = ()
    first_mask: str | None = None

    @property
    def say_where(self) -> bool:
        """Whether any of the columns is there."""
        return bool(self.boxes or self.points or self.first_mask)


def read_places(where: str, raw: dict[str, Any], entities: tuple[str, ...]) -> Places:
    """Reads the columns of a row.

    Args:
        where: file and line, for messages.
        raw: the row; cells of .csv hold JSON.
        entities: its phrases.

    Raises:
        UserError: a column that is no list of the kind above, has another length than `entities`,
            or stands beside `first_mask`.
    """
    boxes = tuple(_box(where, item) for item in _items(where, raw, "boxes", entities))
    points = tuple(_spots(where, item) for item in _items(where, raw, "points", entities))
    first_mask = raw.get("first_mask")
    if first_mask is not None and (not isinstance(first_mask, str) or not first_mask.strip()):
        raise UserError(f"{where}: first_mask must be the path of a label image")
    if first_mask is not None and (boxes or points):
        raise UserError(f"{where}: has first_mask and boxes or points; keep one of them")
    if first_mask is not None and not entities:
        raise UserError(f"{where}: has first_mask, and no entities that say what its labels are")
    return Places(entities, boxes, points, first_mask)


def _items(where: str, raw: dict[str, Any], key: str, entities: tuple[str, ...]) -> list[Any]:
    value = raw.get(key)
    if value is None:
        return []
    if isinstance(value, str):  # a cell of .csv
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: {key} is not valid JSON ({error})") from None
    if not isinstance(value, list):
        raise UserError(f"{where}: {key} must be a list, with an item per entity")
    if len(value) != len(entities):
        raise UserError(f"{where}: {len(value)} {key} for {len(entities)} entities")
    return value


def _box(where: str, item: Any) -> Box | None:
    if item is None:
        return None
    if not isinstance(item, list) or len(item) != 4 or not all(map(_is_number, item)):
        raise UserError(f"{where}: boxes: {item!a} must be [left, top, right, bottom] in pixels")
    left, top, right, bottom = map(float, item)
    if not (left < right and top < bottom):
        raise UserError(f"{where}: boxes: {item!a} is empty: right of left, bottom below top")
    return left, top, right, bottom


def _spots(where: str, item: Any) -> tuple[Spot, ...]:
    spots = [] if item is None else item
    if not isinstance(spots, list):
        raise UserError(f"{where}: points: {item!a} must be a list of [x, y] or [x, y, 0]")
    read = []
    for spot in spots:
        if not isinstance(spot, list) or len(spot) not in (2, 3) or not all(map(_is_number, spot)):
            raise UserError(f"{where}: points: {spot!a} must be [x, y], or [x, y, 0] beside it")
        x, y, inside = (*spot, 1)[:3]
        if inside not in (0, 1):
            raise UserError(
                f"{where}: points: {spot!a} must end in 1, on the entity, or 0, beside it"
            )
        read.append((float(x), float(y), bool(inside)))
    if read and not any(inside for _, _, inside in read):
        raise UserError(f"{where}: points: {item!a} has no point that is on the entity")
    return tuple(read)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
