"""The table of segmenters. Imports none of them: OpenCV and transformers take seconds."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from alignlab.errors import UserError
from alignlab.masks.segmenter import Segmenter


@dataclass(frozen=True)
class SegmenterRow:
    """One way to find entities.

    Args:
        about: one line.
        build: `module:function` that makes it, of a model's folder or hub id if it has one.
        model: what it loads unless told otherwise; None: it has no model.
    """

    about: str
    build: str
    model: str | None = None


SEGMENTERS: dict[str, SegmenterRow] = {
    "opencv": SegmenterRow(
        "no model: GrabCut and optical flow, from boxes, points or a first mask",
        "alignlab.masks.opencv:OpenCV",
    ),
    "sam2": SegmenterRow(
        "SAM 2 video, from boxes, points or a first mask",
        "alignlab.masks.sam2:Sam2",
        model="facebook/sam2.1-hiera-large",
    ),
    "sam3": SegmenterRow(
        "SAM 3 video, from the phrases of the entities",
        "alignlab.masks.sam3:Sam3",
        model="facebook/sam3",
    ),
}


def build_segmenter(name: str, model: str | None = None) -> Segmenter:
    """The segmenter of a name; its model is loaded when it is first needed.

    Args:
        name: key of `SEGMENTERS`.
        model: transformers folder or hub id; None takes the row's.

    Raises:
        UserError: a model for one that has none, or as its constructor.
    """
    row = SEGMENTERS[name]
    if row.model is None:
        if model is not None:
            raise UserError(f"--model: the backend {name} has no model; remove it")
        return cast(Segmenter, pkgutil.resolve_name(row.build)())
    build = cast(Callable[[str], Segmenter], pkgutil.resolve_name(row.build))
    return build(model or row.model)
