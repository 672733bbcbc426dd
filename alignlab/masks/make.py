"""Makes the entity masks of a folder data set, clip by clip.

Each clip's label images appear whole, in a folder of their own: a command that was killed begins
again with the clip that it was at. The data set's metadata stays as it is; a copy with the columns
`masks` and `entities` is written beside it.
Array letters: H height, W width, C channels (RGB).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from alignlab import interruption
from alignlab.config.data import FolderConfig
from alignlab.config.paths import user_path
from alignlab.data.decode import ClipError, decoded_frames, upright
from alignlab.data.derived import (
    check_metadata,
    clip_keys,
    derived_paths,
    difference,
    write_metadata,
)
from alignlab.data.metadata import Row, read_rows
from alignlab.data.places import Places
from alignlab.data.video import check_clip
from alignlab.errors import UserError
from alignlab.masks.files import MOST_ENTITIES, LabelWriter, MaskRecord, read_record
from alignlab.masks.prompts import (
    ClipRequest,
    NoPromptError,
    check_keys,
    clip_request,
    prompts_of,
)
from alignlab.masks.segmenter import Frame, FrameMasks, Prompt, Segmenter
from alignlab.progress import step_progress
from alignlab.runs.atomic_files import whole_folder
from alignlab.runs.file_digests import digest_files
from alignlab.runs.file_lock import file_lock

MIN_CONFIDENCE = 0.7


@dataclass(frozen=True)
class MaskSettings:
    """How masks are made, beside the segmenter.

    Args:
        name: folder inside the data set; also in the name of the new metadata.
        prompts: by clip, in place of what rows say (`read_prompts`).
        from_references: look for each row's references in the first frame.
        min_confidence: an entity of less is in doubt in a frame.
        replace: make masks anew that are there, and of rows that have masks already.
    """

    name: str = "masks"
    prompts: Mapping[str, Places] | None = None
    from_references: bool = False
    min_confidence: float = MIN_CONFIDENCE
    replace: bool = False


@dataclass(frozen=True)
class ClipMasks:
    """What came of a clip.

    Args:
        key: names it.
        row: of the metadata.
        folder: of its label images; None if it has none.
        record: what is said there; None also where a row had masks of its own.
        reason: why it has none.
        is_new: whether they were made now.
    """

    key: str
    row: Row
    folder: Path | None
    record: MaskRecord | None = None
    reason: str = ""
    is_new: bool = False


@dataclass(frozen=True)
class MadeMasks:
    """What came of a data set.

    Args:
        clips: in the order of the rows.
        folder: of all masks.
        metadata: the new file.
    """

    clips: tuple[ClipMasks, ...]
    folder: Path
    metadata: Path


def make_masks(config: FolderConfig, segmenter: Segmenter, settings: MaskSettings) -> MadeMasks:
    """Makes the masks of all rows of a folder data set, of both splits.

    Of each video all frames from the clip's first to its last get a label image, also those that
    `data.fps` leaves out. Masks that are there and were asked for in the same way are not made
    again.

    Args:
        config: of the data set: which clips, how long.
        segmenter: finds entities.
        settings: see there.

    Raises:
        UserError: bad metadata or prompts; something is in the way; with `on_bad_video: error` a
            clip that cannot be used; no clip has masks in the end; another process is at it.
    """
    root = user_path(config.path)
    if not root.is_dir():
        raise UserError(f"data.path: there is no folder {root}")
    folder, metadata = derived_paths(root, config.metadata, settings.name)
    rows = read_rows(root, config.metadata, follow_links=config.follow_links, unmasked=True)
    keys = clip_keys(rows)
    check_keys(settings.prompts or {}, keys)
    check_metadata(folder, metadata, replace=settings.replace)
    folder.mkdir(exist_ok=True)

    def held() -> str:
        return f"another process makes masks in {folder}: wait for it, or choose another --name"

    with file_lock(folder / ".masks.lock", waiting=held, refused=held, remove=True):
        work = _Work(config, segmenter, settings, root, folder)
        clips = work.all_clips(list(zip(keys, rows, strict=True)))
        if all(clip.folder is None for clip in clips):
            raise UserError(
                f"{root / config.metadata}: no clip has masks now; the first one, {clips[0].key}, "
                f"{clips[0].reason}: write where its entities are (docs/masks.md)"
            )
        write_metadata(folder, metadata, _rows_with_masks(root, clips))
    return MadeMasks(tuple(clips), folder, metadata)


class _Work:
    """Makes or finds the masks of clips."""

    def __init__(
        self,
        config: FolderConfig,
        segmenter: Segmenter,
        settings: MaskSettings,
        root: Path,
        folder: Path,
    ) -> None:
        self._config, self._segmenter, self._settings = config, segmenter, settings
        self._root, self._folder = root, folder
        self._digests: dict[str, str] = {}

    def all_clips(self, rows: Sequence[tuple[str, Row]]) -> list[ClipMasks]:
        """One per row, in order."""
        asked = [self._asked(key, row) for key, row in rows]
        files = [path for one in asked if isinstance(one, ClipRequest) for path in _images(one)]
        files += [row.video for _, row in rows]
        self._digests = digest_files(self._root, {str(path): path for path in files})
        clips: list[ClipMasks] = []
        with step_progress("masks", total=len(rows)) as advance:
            for (key, row), request in zip(rows, asked, strict=True):
                clip = request if isinstance(request, ClipMasks) else self._clip(key, row, request)
                clips.append(clip)
                advance(len(clips), _note(clips))
        return clips

    def _asked(self, key: str, row: Row) -> ClipRequest | ClipMasks:
        """What is asked of a row, or what is known without asking."""
        settings = self._settings
        if row.masks is not None and not settings.replace:
            return ClipMasks(key, row, row.masks, read_record(row.masks))
        try:
            request = clip_request(
                row,
                self._root,
                (settings.prompts or {}).get(key),
                reads_texts=self._segmenter.reads_texts,
                from_references=settings.from_references,
            )
        except NoPromptError as error:
            return ClipMasks(key, row, None, reason=str(error))
        if len(request.places.entities) > MOST_ENTITIES:
            raise UserError(f"{row.where}: has more entities than labels, {MOST_ENTITIES}")
        return request

    def _clip(self, key: str, row: Row, request: ClipRequest) -> ClipMasks:
        target = self._folder / key
        wanted = self._wanted(row, request)
        record = read_record(target)
        if record is not None and record.request == wanted:
            return ClipMasks(key, row, target, record)
        if target.exists() and not self._settings.replace:
            how = (
                "was not made by this command"
                if record is None
                else difference(record.request, wanted)
            )
            raise UserError(
                f"{target} is there, and {how}: choose another --name, or make it anew with "
                "--replace"
            )
        try:
            record = self._made(target, row, request, wanted)
        except NoPromptError as error:
            return ClipMasks(key, row, None, reason=str(error))
        except ClipError as error:
            if self._config.on_bad_video == "error":
                raise ClipError(
                    f"{row.where}: {error}; mend the file or the row, or leave such clips out with "
                    "data.on_bad_video=skip",
                    error.kind,
                ) from error
            return ClipMasks(key, row, None, reason=f"{error.kind}: {error}")
        return ClipMasks(key, row, target, record, is_new=True)

    def _wanted(self, row: Row, request: ClipRequest) -> dict[str, Any]:
        """All that the masks of a clip depend on, as JSON holds it."""
        wanted = {
            **self._segmenter.settings,
            **request.said(),
            "min_confidence": self._settings.min_confidence,
            "video": self._digests[str(row.video)],
            "images": [self._digests[str(path)] for path in _images(request)],
            "start_s": row.start_s,
            "clip_frames": self._config.frames,
            "fps": self._config.fps,
        }
        return dict(json.loads(json.dumps(wanted)))

    def _made(
        self, target: Path, row: Row, request: ClipRequest, wanted: dict[str, Any]
    ) -> MaskRecord:
        first, frames = clip_frames(row, self._config)
        before = next(frames)
        prompts = prompts_of(request, before)
        if not (self._segmenter.reads_texts or any(prompt.has_place for prompt in prompts)):
            raise NoPromptError("says of none of its entities where it is")
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as partial:
            writer = LabelWriter(partial, first, self._settings.min_confidence)
            for found in segmented(self._segmenter, before, frames, prompts):
                writer.write(found)
                interruption.check()
            return writer.finish(wanted, [prompt.phrase for prompt in prompts])


def segmented(
    segmenter: Segmenter, first_HWC: Frame, others: Iterator[Frame], prompts: Sequence[Prompt]
) -> Iterator[FrameMasks]:
    """Masks of all prompts in all frames; an entity that has no place is nowhere, and in doubt."""
    asked = [n for n, p in enumerate(prompts) if p.has_place or segmenter.reads_texts]

    def frames() -> Iterator[Frame]:
        yield first_HWC
        yield from others

    for found in segmenter.segment(frames(), [prompts[number] for number in asked]):
        masks_EHW = np.zeros((len(prompts), *found.masks_EHW.shape[1:]), np.bool_)
        confidence_E = np.zeros(len(prompts), np.float32)
        masks_EHW[asked], confidence_E[asked] = found.masks_EHW, found.confidence_E
        yield FrameMasks(masks_EHW, confidence_E)


def clip_frames(row: Row, config: FolderConfig) -> tuple[int, Iterator[Frame]]:
    """Index of a clip's first frame in its video, and all frames to its last, as they are stored.

    Raises:
        ClipError: as `check_clip`, or the picture changes its size on the way.
    """
    facts = check_clip(
        row.video, frames=config.frames, fps=config.fps, start_s=row.start_s, seek=False
    )
    first, last = min(facts.frame_indices), max(facts.frame_indices)

    def frames() -> Iterator[Frame]:
        reformatter = VideoReformatter()
        for index, timed in enumerate(decoded_frames(row.video)):
            if first <= index <= last:
                frame_HWC = upright(timed, reformatter)[0].numpy()
                if frame_HWC.shape[:2] != facts.source_size_HW:
                    size = "x".join(map(str, frame_HWC.shape[:2]))
                    raise ClipError(f"{row.video}: has frames of several sizes ({size})")
                yield frame_HWC
            if index == last:
                return

    return first, frames()


def _images(request: ClipRequest) -> list[Path]:
    first_mask = [] if request.first_mask is None else [request.first_mask]
    return [*request.references, *first_mask]


def _rows_with_masks(root: Path, clips: Sequence[ClipMasks]) -> Iterator[dict[str, Any]]:
    """The rows with their masks; those that have none are without entities as well."""
    for clip in clips:
        row, columns = clip.row, ("masks", "entities", "entity_names")
        raw = {key: value for key, value in row.raw.items() if key not in columns}
        if clip.folder is not None:
            entities = row.entities if clip.record is None else tuple(clip.record.entities)
            masks = clip.folder.relative_to(root).as_posix()
            raw |= {"masks": masks, "entities": list(entities)}
            # the row's names are those of its own entities
            if row.entity_names and entities == row.places.entities:
                raw |= {"entity_names": list(row.entity_names)}
        yield raw


def _note(clips: Sequence[ClipMasks]) -> str:
    records = [clip.record for clip in clips if clip.record is not None]
    frames, undecided = sum(r.frames for r in records), sum(r.undecided for r in records)
    left_out = sum(clip.folder is None for clip in clips)
    note = f"{undecided:,} of {frames:,} frames undecided"
    return f"{note}, {left_out} clips without masks" if left_out else note
