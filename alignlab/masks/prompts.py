"""What a segmenter is asked of a clip: from its row, a file of prompts, or its references.

Array letters: H height, W width, C channels (RGB).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.config.data import unknown_name
from alignlab.data.decode import ClipError
from alignlab.data.images import read_image, read_labels
from alignlab.data.masks import VOID_LABEL
from alignlab.data.metadata import Row
from alignlab.data.places import Places, read_places
from alignlab.errors import UserError
from alignlab.masks.find_reference import find_reference
from alignlab.masks.phrases import noun_phrases
from alignlab.masks.segmenter import Frame, Point, Prompt

MIN_SCORE = 0.6
"""Correlation from which on a reference counts as found."""


class NoPromptError(UserError):
    """Nothing says what a segmenter should look for in a clip, or where."""


@dataclass(frozen=True)
class ClipRequest:
    """What is asked of a clip, before any of its pixels is read.

    Args:
        places: phrases, and what the row says of where they are.
        references: images of the entities that are looked for in the first frame, if it does not.
        first_mask: the label image of the first frame.
        origin: where phrases come from.
    """

    places: Places
    references: tuple[Path, ...]
    first_mask: Path | None
    origin: str

    def said(self) -> dict[str, Any]:
        """All of it but the contents of files."""
        return {
            "entities": list(self.places.entities),
            "boxes": [None if box is None else list(box) for box in self.places.boxes],
            "points": [[list(spot) for spot in spots] for spots in self.places.points],
            "first_mask": self.places.first_mask,
            "references": len(self.references),
        }


def read_prompts(path: Path) -> dict[str, Places]:
    """A file of prompts: a JSON object of `entities`, `boxes`, `points` by `file_name`.

    A clip that begins later in its video has the key `file_name@start`.

    Raises:
        UserError: no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"--prompts: there is no file {path}") from None
    except (ValueError, RecursionError) as error:  # also what is no UTF-8
        raise UserError(f"--prompts: {path} is no JSON ({error})") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(f"--prompts: {path} must hold an object of objects, one per clip")
    places = {}
    for key, value in content.items():
        where = f"--prompts: {path.name}: {key}"
        entities = value.get("entities")
        if not isinstance(entities, list) or not entities:
            raise UserError(f"{where}: entities is missing or empty")
        if not all(isinstance(phrase, str) and phrase.strip() for phrase in entities):
            raise UserError(f"{where}: entities must be a list of texts")
        if "first_mask" in value:
            raise UserError(f"{where}: first_mask is a column of the metadata, not of this file")
        places[key] = read_places(where, value, tuple(entities))
    return places


def check_keys(given: Mapping[str, Places], keys: list[str]) -> None:
    """Refuses prompts of clips that are not there.

    Raises:
        UserError: the first of them.
    """
    for key in given:
        if key not in keys:
            raise UserError(f"--prompts: {unknown_name('clip', key, keys)}")


def clip_request(
    row: Row, root: Path, given: Places | None, *, reads_texts: bool, from_references: bool
) -> ClipRequest:
    """What is asked of a clip.

    Args:
        row: of the metadata.
        root: folder of the data set.
        given: what the file of prompts says of it, in place of the row.
        reads_texts: whether the segmenter needs phrases alone.
        from_references: look for the row's references in the first frame.

    Raises:
        NoPromptError: there is nothing to ask for.
        UserError: a mistake in the row.
    """
    if from_references:
        return _of_references(row)
    places = row.places if given is None else given
    origin = "entities" if given is None else "prompts"
    if reads_texts:
        if not places.entities:
            places, origin = Places(noun_phrases(row.caption)), "caption"
        if not places.entities:
            raise NoPromptError("has no entities, and its caption names none")
        # one search for equal phrases, which are one entity then
        return ClipRequest(Places(tuple(dict.fromkeys(places.entities))), (), None, origin)
    if not places.say_where:
        raise NoPromptError("has no boxes, points or first_mask")
    first_mask = None if places.first_mask is None else root / places.first_mask
    return ClipRequest(places, (), first_mask, origin)


def _of_references(row: Row) -> ClipRequest:
    if not row.references:
        raise NoPromptError("has no references")
    if not all(row.reference_phrases):
        raise UserError(
            f"{row.where}: --from-references needs reference_phrases, what the caption calls each"
        )
    # equal names are the same subject: the first one is looked for
    first = {name: at for at, name in reversed(list(enumerate(row.reference_names)))}
    chosen = sorted(first.values())
    phrases = tuple(row.reference_phrases[at] for at in chosen)
    references = tuple(row.references[at] for at in chosen)
    return ClipRequest(Places(phrases), references, None, "references")


def prompts_of(request: ClipRequest, frame_HWC: Frame) -> tuple[Prompt, ...]:
    """The prompts for a clip's first frame; those of entities that are not found have no place.

    Raises:
        ClipError: a box or a point beside the frame, a first mask of another size or with other
            labels, an image that cannot be read.
        NoPromptError: no reference is found.
    """
    height, width = frame_HWC.shape[:2]
    if request.first_mask is not None:
        return _of_mask(request, request.first_mask, (height, width))
    if request.references:
        return _found(request, frame_HWC)
    places = request.places
    boxes = places.boxes or (None,) * len(places.entities)
    points = places.points or ((),) * len(places.entities)
    prompts = []
    for phrase, box, spots in zip(places.entities, boxes, points, strict=True):
        if box is not None and not (box[0] < width and box[1] < height and min(box[2:]) > 0):
            raise ClipError(
                f"the box {list(box)} of {phrase!r} is beside its {width}x{height} pixels"
            )
        for x, y, _ in spots:
            if not (0 <= x < width and 0 <= y < height):
                raise ClipError(
                    f"the point [{x:g}, {y:g}] of {phrase!r} is beside its {width}x{height} pixels"
                )
        prompts.append(Prompt(phrase, box, tuple(Point(*spot) for spot in spots)))
    return tuple(prompts)


def _of_mask(request: ClipRequest, path: Path, size_HW: tuple[int, int]) -> tuple[Prompt, ...]:
    labels_HW = read_labels(path).numpy()
    if labels_HW.shape != size_HW:
        size, of_video = ("x".join(map(str, hw)) for hw in (labels_HW.shape, size_HW))
        raise ClipError(f"{path}: is {size} (height x width), the video {of_video}", "bad masks")
    phrases = request.places.entities
    unnamed = set(labels_HW.flat) - {0, VOID_LABEL} - set(range(1, len(phrases) + 1))
    if unnamed:
        raise ClipError(
            f"{path}: has the label {min(unnamed)}, and the row names {len(phrases)} entities",
            "bad masks",
        )
    masks = (labels_HW == number + 1 for number in range(len(phrases)))
    pairs = zip(phrases, masks, strict=True)
    return tuple(Prompt(p, mask_HW=mask if mask.any() else None) for p, mask in pairs)


def _found(request: ClipRequest, frame_HWC: Frame) -> tuple[Prompt, ...]:
    prompts = []
    for phrase, path in zip(request.places.entities, request.references, strict=True):
        image_HWC, mask_HW = read_image(path)
        mask = None if mask_HW is None else mask_HW.numpy()
        found = find_reference(frame_HWC, image_HWC.numpy(), mask)
        is_there = found is not None and found.score >= MIN_SCORE
        prompts.append(Prompt(phrase, box=found.box if is_there and found else None))
    if not any(prompt.has_place for prompt in prompts):
        raise NoPromptError("has no reference that is found in its first frame")
    return tuple(prompts)
