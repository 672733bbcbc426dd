"""Makes the references of a folder data set out of its videos and masks, clip by clip.

The references of a clip appear whole, in a folder of their own: a command that was killed begins
again with the clip that it was at. The data set's metadata stays as it is; a copy with the columns
`references`, `reference_names`, `reference_phrases` and `split` is written beside it.
Array letters: H height, W width, C channels (RGB and alpha).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from alignlab import interruption
from alignlab.config.data import FolderConfig
from alignlab.config.paths import user_path
from alignlab.data.decode import ClipError
from alignlab.data.derived import (
    WRITTEN,
    check_metadata,
    clip_keys,
    derived_paths,
    difference,
    write_metadata,
)
from alignlab.data.masks import frame_labels
from alignlab.data.metadata import Row, read_rows
from alignlab.data.resize import cover_crop
from alignlab.data.split import deal
from alignlab.errors import UserError
from alignlab.masks.segmenter import Frame
from alignlab.progress import step_progress
from alignlab.randomness import generator
from alignlab.references.augment import augmented
from alignlab.references.pairs import (
    MaskedClip,
    PairChooser,
    Pick,
    ReferenceSettings,
    subject_names,
)
from alignlab.references.record import (
    RECORD,
    MadeReference,
    ReferenceRecord,
    read_references_record,
)
from alignlab.references.sights import cut_out, read_frames
from alignlab.runs.atomic_files import whole_folder, write_text
from alignlab.runs.file_digests import combined, digest_files
from alignlab.runs.file_lock import file_lock

VERSION = 1
"""Of the code between videos, masks and references. Raise it when the same files give others."""
COLUMNS = ("references", "reference_names", "reference_phrases")


@dataclass(frozen=True)
class ClipReferences:
    """What came of a clip.

    Args:
        key: names it.
        row: of the metadata.
        split: that it is dealt to.
        folder: of its references; None if none could be made.
        record: what is said there.
        reason: why there is no folder.
        is_new: whether they were made now.
    """

    key: str
    row: Row
    split: str
    folder: Path | None
    record: ReferenceRecord | None = None
    reason: str = ""
    is_new: bool = False


@dataclass(frozen=True)
class MadeReferences:
    """What came of a data set.

    Args:
        clips: in the order of the rows.
        folder: of all references.
        metadata: the new file.
    """

    clips: tuple[ClipReferences, ...]
    folder: Path
    metadata: Path


def make_references(config: FolderConfig, settings: ReferenceSettings) -> MadeReferences:
    """Cuts references for all rows that have masks, of both splits.

    References that are there and were asked for in the same way are not made again.

    Args:
        config: of the data set: which clips, which of their frames are trained on, the split.
        settings: see there.

    Raises:
        UserError: bad metadata; no row has masks; something is in the way; with
            `on_bad_video: error` a clip that cannot be used; nothing comes out; another process is
            at it.
    """
    root = user_path(config.path)
    if not root.is_dir():
        raise UserError(f"data.path: there is no folder {root}")
    folder, metadata = derived_paths(root, config.metadata, settings.name)
    rows = read_rows(root, config.metadata, follow_links=config.follow_links, unmasked=True)
    if all(row.masks is None for row in rows):
        raise UserError(_how_to_get_masks(root, config.metadata))
    check_metadata(folder, metadata, replace=settings.replace)
    _check_folder(folder)
    folder.mkdir(exist_ok=True)

    def held() -> str:
        return (
            f"another process makes references in {folder}: wait for it, or choose another --name"
        )

    with file_lock(folder / ".references.lock", waiting=held, refused=held, remove=True):
        if not (folder / WRITTEN).exists():
            write_text(folder / WRITTEN, "{}")
        clips = _Work(config, settings, root, folder, rows).all_clips()
        if not any(clip.record and any(clip.record.versions) for clip in clips):
            raise UserError(
                f"{root / config.metadata}: no subject has a reference; the first clip, "
                f"{clips[0].key}, {_why_none(clips[0])}: see docs/references.md for what is dropped"
            )
        write_metadata(folder, metadata, _rows_with_references(root, clips))
    return MadeReferences(tuple(clips), folder, metadata)


class _Work:
    """Makes or finds the references of clips."""

    def __init__(
        self,
        config: FolderConfig,
        settings: ReferenceSettings,
        root: Path,
        folder: Path,
        rows: Sequence[Row],
    ) -> None:
        self._config, self._settings, self._folder = config, settings, folder
        splits = deal(rows, root, config.val_fraction)
        keyed = list(zip(clip_keys(rows), rows, splits, strict=True))
        self._clips = [
            MaskedClip(key, row, split, subject_names(key, row, settings.same_subject))
            for key, row, split in keyed
        ]
        masked = [clip for clip in self._clips if clip.row.masks is not None]
        self._chooser = PairChooser(config, settings, masked)
        paths = [path for c in masked for path in (c.row.video, c.row.masks) if path is not None]
        self._digests = digest_files(root, {str(path): path for path in paths})
        self._clip_digests: dict[str, str] = {}

    def all_clips(self) -> list[ClipReferences]:
        """One per row, in order."""
        clips: list[ClipReferences] = []
        references = dropped = 0
        with step_progress("references", total=len(self._clips)) as advance:
            for clip in self._clips:
                clips.append(self._clip(clip))
                record = clips[-1].record
                if record is not None:
                    references += sum(map(len, record.versions))
                    dropped += len(record.dropped)
                advance(len(clips), f"{references:,} references, {dropped:,} subjects dropped")
                interruption.check()
        return clips

    def _clip(self, clip: MaskedClip) -> ClipReferences:
        if clip.row.masks is None:
            return ClipReferences(clip.key, clip.row, clip.split, None, reason="has no masks")
        target, wanted = self._folder / clip.key, self._wanted(clip)
        record = read_references_record(target)
        if record is not None and record.request == wanted:
            return ClipReferences(clip.key, clip.row, clip.split, target, record)
        if record is None and target.exists():  # --replace is for what this command made
            raise UserError(
                f"{target} is there, and was not made by this command: choose another --name"
            )
        if record is not None and not self._settings.replace:
            raise UserError(
                f"{target} is there, and {difference(record.request, wanted)}: choose another "
                "--name, or make it anew with --replace"
            )
        try:
            record = self._made(target, clip, wanted)
        except ClipError as error:
            if self._config.on_bad_video == "error":
                raise ClipError(
                    f"{clip.row.where}: {error}; mend the file or the row, or leave such clips out "
                    "with data.on_bad_video=skip",
                    error.kind,
                ) from error
            reason = f"{error.kind}: {error}"
            return ClipReferences(clip.key, clip.row, clip.split, None, reason=reason)
        return ClipReferences(clip.key, clip.row, clip.split, target, record, is_new=True)

    def _versions(self, clip: MaskedClip) -> int:
        return self._settings.versions if clip.split == "train" else 1

    def _wanted(self, clip: MaskedClip) -> dict[str, Any]:
        """All that the references of a clip depend on, as JSON holds it."""
        settings = asdict(self._settings)
        for name in ("name", "replace", "augment", "versions", "same_subject"):
            del settings[name]
        if self._settings.pairs != "mixed":
            del settings["cross_share"]
        augment = self._settings.augment if clip.split == "train" else None
        wanted = {
            **settings,
            **self._made_from(clip),
            "made_by": VERSION,
            "start_s": clip.row.start_s,
            "clip_frames": self._config.frames,
            "fps": self._config.fps,
            "versions": self._versions(clip),
            "augment": None if augment is None else augment.model_dump(),
        }
        if self._settings.pairs != "regular":
            others = [c for clips in self._chooser.others(clip).values() for c in clips]
            wanted["others"] = combined({other.key: self._digest(other) for other in others})
        return dict(json.loads(json.dumps(wanted)))

    def _digest(self, clip: MaskedClip) -> str:
        """Of all that a clip is cut from; asked by each clip of the same subject."""
        if clip.key not in self._clip_digests:
            parts = {name: json.dumps(value) for name, value in self._made_from(clip).items()}
            self._clip_digests[clip.key] = combined(parts)
        return self._clip_digests[clip.key]

    def _made_from(self, clip: MaskedClip) -> dict[str, Any]:
        return {
            "video": self._digests[str(clip.row.video)],
            "masks": self._digests[str(clip.row.masks)],
            "entities": list(clip.row.entities),
            "names": list(clip.names),
        }

    def _made(self, target: Path, clip: MaskedClip, wanted: dict[str, Any]) -> ReferenceRecord:
        versions, dropped = self._chooser.choose(clip, self._versions(clip))
        frames = _frames_of(pick for picks in versions for pick in picks)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as partial:
            record = ReferenceRecord(
                request=wanted,
                versions=[
                    [self._written(partial, clip, pick, number, frames) for pick in picks]
                    for number, picks in enumerate(versions)
                ],
                dropped=dropped,
            )
            write_text(partial / RECORD, record.model_dump_json(indent=1))
        return record

    def _written(
        self,
        folder: Path,
        clip: MaskedClip,
        pick: Pick,
        version: int,
        frames: dict[tuple[Path, int], tuple[Frame, float]],
    ) -> MadeReference:
        """Cuts out a reference and writes it."""
        frame_HWC, pixel_aspect = frames[pick.source.row.video, pick.sight.frame]
        labels_HW = frame_labels(pick.source.row, pick.sight.frame, frame_HWC.shape[:2]).numpy()
        picture_HWC = _square_pixels(cut_out(frame_HWC, labels_HW, pick.sight), pixel_aspect)
        is_cross = pick.source is not clip
        changes: dict[str, Any] = {}
        augment = self._settings.augment
        if augment is not None and clip.split == "train" and not is_cross:
            purpose = f"reference augmentation {clip.key}"
            draws = generator(self._settings.seed, purpose, pick.label, version)
            picture_HWC, changes = augmented(picture_HWC, augment, draws)
        name = f"{version}-{pick.label}.png"
        Image.fromarray(picture_HWC, "RGBA").save(folder / name)
        return MadeReference(
            file=name,
            label=pick.label,
            phrase=clip.row.entities[pick.label - 1],
            name=clip.names[pick.label - 1],
            pair="cross" if is_cross else "regular",
            clip=pick.source.key,
            source_label=pick.sight.label,
            frame=pick.sight.frame,
            is_trained=pick.is_trained,
            share=round(pick.sight.share, 4),
            pixels=pick.sight.pixels,
            changes=changes,
        )


def _frames_of(picks: Iterator[Pick]) -> dict[tuple[Path, int], tuple[Frame, float]]:
    """The frames that references are cut from, by video and index; each video is decoded once."""
    wanted: dict[Path, tuple[Row, set[int]]] = {}
    for pick in picks:
        row = pick.source.row
        wanted.setdefault(row.video, (row, set()))[1].add(pick.sight.frame)
    return {
        (video, index): frame
        for video, (row, indices) in wanted.items()
        for index, frame in read_frames(row, indices).items()
    }


def _square_pixels(picture_HWC: NDArray[np.uint8], pixel_aspect: float) -> NDArray[np.uint8]:
    """The picture as it is shown: pixels of anamorphic video are wider than high, or narrower."""
    if pixel_aspect == 1:
        return picture_HWC
    height, width, _ = picture_HWC.shape
    shown_CHW = cover_crop(
        torch.from_numpy(picture_HWC).permute(2, 0, 1),
        (height, max(1, round(width * pixel_aspect))),
        pixel_aspect=pixel_aspect,
    )
    shown_HWC = shown_CHW.permute(1, 2, 0).numpy().copy()
    is_subject_HW = shown_HWC[..., 3] >= 128
    shown_HWC[..., 3] = np.where(is_subject_HW, 255, 0)
    shown_HWC[~is_subject_HW, :3] = 255
    return shown_HWC


def _check_folder(folder: Path) -> None:
    """Refuses a folder that something else wrote, so that none of its files is in danger."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / WRITTEN).is_file():
        raise UserError(
            f"--name: {folder} is there, and was not made by this command: choose another --name"
        )


def _how_to_get_masks(root: Path, metadata: str) -> str:
    made = (root / metadata).with_name(f"{Path(metadata).stem}-masks.jsonl")
    line = f"{root / metadata}: no row has masks, which references are cut out by: "
    if made.is_file():
        return f"{line}read those of {made.name} with data.metadata={made.relative_to(root)}"
    return (
        f"{line}`alignlab data masks RECIPE` makes them, and data.metadata="
        f"{made.relative_to(root)} reads them then"
    )


def _why_none(clip: ClipReferences) -> str:
    if clip.record is None:
        return clip.reason
    first = clip.record.dropped[0]
    return f"has {first.phrase!r}, which is dropped ({first.reason}, {100 * first.share:.1f} %)"


def _rows_with_references(root: Path, clips: Sequence[ClipReferences]) -> Iterator[dict[str, Any]]:
    """The rows: one for each version that has references; without any, one without references.

    Each says its split: what is written depends on it.
    """
    for clip in clips:
        raw = {key: value for key, value in clip.row.raw.items() if key not in COLUMNS}
        raw["split"] = clip.split
        versions = [] if clip.record is None else list(filter(None, clip.record.versions))
        if clip.folder is None or not versions:
            yield raw
            continue
        folder = clip.folder.relative_to(root).as_posix()
        for made in versions:
            yield raw | {
                "references": [f"{folder}/{reference.file}" for reference in made],
                "reference_names": [reference.name for reference in made],
                "reference_phrases": [reference.phrase for reference in made],
            }
