"""What the references of a clip were made from, and which came out."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

RECORD = "references.json"

Reason = Literal["not seen", "too small", "in trained frames alone", "no other clip", "smaller"]
"""Why a subject has no reference: its mask is empty in all frames; its box is a smaller share of
every frame than asked for; only frames that the clip is trained on show it, and they are not asked
for; no other clip shows the same subject well enough; others of the same clip are larger."""


class MadeReference(BaseModel):
    """A reference.

    Args:
        file: in the folder of the clip.
        label: of the entity in the clip's masks.
        phrase: what the caption calls it.
        name: of the subject.
        pair: of the same clip, or of another one.
        clip: key of the clip that it is cut from.
        source_label: of the entity there.
        frame: index in that clip's video.
        is_trained: whether that frame is one that the clip is trained on.
        share: of the frame that the crop has.
        pixels: of the subject in it.
        changes: what was drawn for its augmentation.
    """

    file: str
    label: int
    phrase: str
    name: str
    pair: Literal["regular", "cross"]
    clip: str
    source_label: int
    frame: int
    is_trained: bool
    share: float
    pixels: int
    changes: dict[str, Any] = {}


class DroppedSubject(BaseModel):
    """A subject that has no reference in any version.

    Args:
        label: of the entity in the clip's masks.
        phrase: what the caption calls it.
        reason: see there.
        share: of the frame that its largest box has.
    """

    label: int
    phrase: str
    reason: Reason
    share: float


class ReferenceRecord(BaseModel):
    """What a folder of references says of itself.

    Args:
        request: all that they depend on.
        versions: the references of each version of the clip.
        dropped: subjects without any.
    """

    request: dict[str, Any]
    versions: list[list[MadeReference]]
    dropped: list[DroppedSubject]

    @property
    def subjects(self) -> int:
        """How many entities there are."""
        return len(self.request["entities"])


def read_references_record(folder: Path) -> ReferenceRecord | None:
    """What a folder of references says of itself; None if it was not made here."""
    try:
        return ReferenceRecord.model_validate_json((folder / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
