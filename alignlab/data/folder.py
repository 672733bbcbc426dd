"""`folder`: clips, captions and reference images listed by a metadata file.

The columns are described in `alignlab.data.metadata`.
Shape letters: T frames, H height, W width, C channels (RGB), E entities.
"""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Lock

from torch import Tensor

from alignlab.config.data import FolderConfig
from alignlab.config.paths import user_path
from alignlab.data.check import MediaCheck, check_media
from alignlab.data.decode import ClipError, media_libraries
from alignlab.data.images import read_image
from alignlab.data.masks import check_masks, clip_masks, mask_files
from alignlab.data.metadata import Row, misnamed_columns, read_rows
from alignlab.data.resize import fit_reference
from alignlab.data.sample import Reference, Sample
from alignlab.data.split import Split, deal
from alignlab.data.video import check_clip, decode_clip
from alignlab.dataset_cache.clip_keys import ClipOrigin
from alignlab.dataset_cache.key import Part
from alignlab.errors import UserError
from alignlab.progress import warn_once
from alignlab.runs.file_digests import check_read, digest_files

DECODING_VERSION = 1
"""Of the code between a file and its pixels. Raise it when the same file gives other pixels: what
the dataset cache holds of the older ones is then not read any more."""


class FolderDataset:
    """Clips of a folder; which rows are in and at which index is settled at construction.

    Args:
        config: see `alignlab.config.data.FolderConfig`.
        split: which rows are in it says `alignlab.data.split.deal`.
        memory: folder that keeps what the check of the files found (`alignlab.data.check`); None:
            it is not kept.

    `notes` are warnings about the split: clips that were left out, colours that are read too pale.

    Raises:
        ClipError: with `on_bad_video: error`, a clip that is unreadable, damaged or too short, that
            is short of references, or whose references or masks cannot be used. With `skip` such
            clips are left out and counted in one warning.
        UserError: bad metadata, or nothing left in the split.
    """

    def __init__(self, config: FolderConfig, split: Split, memory: Path | None = None) -> None:
        self.config = config
        self.split = split
        self._memory = memory
        root = user_path(config.path)
        if not root.is_dir():
            raise UserError(f"data.path: there is no folder {root}")
        rows = read_rows(root, config.metadata, follow_links=config.follow_links)
        misnamed = tuple(
            f"{root / config.metadata}: nothing reads the column {name!r}; did you mean {column!r}?"
            for name, column in misnamed_columns(rows).items()
            if split == "train"  # once for each data set
        )
        for note in misnamed:
            warn_once(note)
        dealt = zip(rows, deal(rows, root, config.val_fraction), strict=True)
        in_split = [row for row, dealt_to in dealt if dealt_to == split]
        self.notes: tuple[str, ...] = misnamed
        self._rows = self._usable(in_split)
        self._keys = _unique_keys(self._rows)
        self._chosen: dict[int, tuple[int, ...]] = {}
        self._known_digests: dict[Path, str] = {}
        self._hashing = Lock()
        self._stamps: dict[Path, tuple[int, int] | None] = {}
        if not self._rows:
            raise UserError(
                f"{root}: no clip left in the {split} split ({len(in_split)} of {len(rows)} rows "
                f"are dealt to it); add clips or change data.val_fraction"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        clip = decode_clip(
            row.video,
            frames=self.config.frames,
            fps=self.config.fps,
            size_HW=self.config.size,
            start_s=row.start_s,
            seek=row.masks is None,
        )
        self._check_unchanged(row.video)
        masks = None if row.masks is None else clip_masks(row, clip, self.config.size)
        return Sample(
            key=self._keys[index],
            video_THWC=clip.video_THWC,
            caption=row.caption,
            references=self.references(index),
            entities=row.entities,
            masks_ETHW=None if masks is None else masks.masks_ETHW,
            undecided_THW=None if masks is None else masks.undecided_THW,
        )

    def key(self, index: int) -> str:
        """The key of a clip."""
        return self._keys[index]

    def references(self, index: int) -> tuple[Reference, ...]:
        """The references of a clip; its video is not read."""
        row, references = self._rows[index], []
        for place in self._places(index):
            image_HWC, mask_HW = fit_reference(*read_image(row.references[place]), self.config.size)
            self._check_unchanged(row.references[place])
            name, phrase = row.reference_names[place], row.reference_phrases[place]
            references.append(Reference(image_HWC, mask_HW, name, phrase))
        return tuple(references)

    def names(self, index: int) -> tuple[str, ...]:
        """The names of the references of a clip; images are read if there are more than asked."""
        names = self._rows[index].reference_names
        return tuple(names[place] for place in self._places(index))

    def origin(self, index: int) -> ClipOrigin:
        """Digests of the files of a clip, and how they are decoded.

        Raises:
            UserError: a file of the split cannot be read any more.
        """
        row, config, digests = self._rows[index], self.config, self._digests()
        decoding: dict[str, Part] = {
            "data": "folder",
            "size": tuple(config.size),
            "decoding": DECODING_VERSION,
            "decoders": media_libraries(),
        }
        return ClipOrigin(
            {
                **decoding,
                "file": digests[row.video],
                "start_s": float(row.start_s),
                "frames": config.frames,
                "fps": config.fps,
                "seeks": row.masks is None,
            },
            {
                **decoding,
                "files": tuple(digests[path] for path in row.references),
                "taken": min(len(row.references), config.references[1]),
            },
        )

    def without_masks(self) -> str | None:
        """Key of the first clip whose entity masks are unknown; None if there is no such clip."""
        rows = zip(self._keys, self._rows, strict=True)
        return next((key for key, row in rows if row.masks is None), None)

    def caption(self, index: int) -> str:
        """The caption of a clip."""
        return self._rows[index].caption

    def entities(self, index: int) -> tuple[str, ...]:
        """What the masked subjects of a clip are called."""
        return self._rows[index].entities

    def share_with_references(self) -> float:
        """Share of the clips whose row lists a reference."""
        return sum(bool(row.references) for row in self._rows) / len(self._rows)

    def _usable(self, rows: list[Row]) -> list[Row]:
        """The rows whose files can be used, all decoded as a sample is."""
        is_strict = self.config.on_bad_video == "error"
        errors = [self._shortage(row) for row in rows]
        if is_strict:
            self._refuse_first(errors)  # before hours of decoding
        files = [None if e else self._file_checks(r) for r, e in zip(rows, errors, strict=True)]
        ordered = [check for checks in files if checks for check in checks]
        verdicts = check_media(ordered, self._memory, stop_at_error=is_strict)
        remarks = Counter[str]()
        for at, (row, checks) in enumerate(zip(rows, files, strict=True)):
            for check in checks or ():
                verdict = verdicts.get(check.key)  # none behind the first error, if that stops
                if verdict is not None and verdict.error is not None:
                    errors[at] = ClipError(f"{row.where}: {verdict.error}", verdict.kind)
                    break
            if checks and errors[at] is None and checks[0].key in verdicts:
                remarks.update(filter(None, [verdicts[checks[0].key].remark]))
        if is_strict:
            self._refuse_first(errors)
        notes = self._notes([e for e in errors if e is not None], len(rows), remarks)
        for note in notes:
            warn_once(note)
        self.notes += notes
        return [row for row, error in zip(rows, errors, strict=True) if error is None]

    def _refuse_first(self, errors: list[ClipError | None]) -> None:
        for error in errors:
            if error is not None:
                raise ClipError(
                    f"{error}; mend the file or the row, or leave such clips out with "
                    "data.on_bad_video=skip",
                    error.kind,
                )

    def _shortage(self, row: Row) -> ClipError | None:
        fewest = self.config.references[0]
        if len(row.references) >= fewest:
            return None
        return ClipError(
            f"{row.where}: has {len(row.references)} references, data.references asks "
            f"for at least {fewest}",
            kind="short of references",
        )

    def _file_checks(self, row: Row) -> list[MediaCheck]:
        """Of the clip with its masks, and of every reference."""
        return [self._clip_check(row), *map(_image_check, row.references)]

    def _clip_check(self, row: Row) -> MediaCheck:
        settings = self.config
        asked = f"{settings.frames} frames at {settings.fps} fps from {row.start_s!r} s"
        key = f"{asked}: {os.path.abspath(row.video)}"
        check = partial(_check_row, row, frames=settings.frames, fps=settings.fps)
        if row.masks is None:
            return MediaCheck(key, (row.video,), check)
        key += f", {len(row.entities)} entities: {os.path.abspath(row.masks)}"
        return MediaCheck(key, (row.video, *mask_files(row.masks)), check)

    def _notes(self, bad: list[ClipError], num_rows: int, remarks: Counter[str]) -> tuple[str, ...]:
        notes = []
        if bad:
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(e.kind for e in bad).items())
            notes.append(
                f"{self.config.path}: {len(bad)} of {num_rows} clips of the {self.split} split "
                f"skipped: {kinds}; first: {bad[0]}"
            )
        for remark, count in remarks.items():
            notes.append(
                f"{self.config.path}: {count} of {num_rows - len(bad)} clips of the {self.split} "
                f"split {remark}"
            )
        return tuple(notes)

    def _places(self, index: int) -> tuple[int, ...]:
        """Which of the row's references are taken: the largest crops, largest first, as in
        RefAlign's code; of equal ones the first. Of no more than asked for, all in their order."""
        paths, most = self._rows[index].references, self.config.references[1]
        if len(paths) <= most or not most:
            return tuple(range(len(paths)))[:most]
        if index not in self._chosen:
            areas = [_crop_area(*read_image(path)) for path in paths]
            places = sorted(range(len(paths)), key=areas.__getitem__, reverse=True)
            self._chosen[index] = tuple(places[:most])
        return self._chosen[index]

    def _digests(self) -> dict[Path, str]:
        """Of the videos and the reference images of the split."""
        with self._hashing:  # threads that make batches all ask
            if not self._known_digests:
                root = user_path(self.config.path)
                paths = [path for row in self._rows for path in (row.video, *row.references)]
                self._stamps = {path: _stamp(path) for path in paths}  # before they are hashed
                names = {path.relative_to(root).as_posix(): path for path in paths}
                digests = digest_files(root, names)
                check_read(root, digests)
                self._known_digests = {names[name]: digest for name, digest in digests.items()}
            return self._known_digests

    def _check_unchanged(self, path: Path) -> None:
        """Refuses a file that is not the one that `origin` has told of."""
        if path in self._stamps and _stamp(path) != self._stamps[path]:
            raise UserError(f"{path} has changed since it was hashed: start again")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None  # whoever reads it says why
    return found.st_size, found.st_mtime_ns


def _crop_area(image_HWC: Tensor, mask_HW: Tensor | None) -> int:
    """Pixels of the smallest box around the subject, in the image as it lies in its file."""
    if mask_HW is None:
        return int(image_HWC.shape[0] * image_HWC.shape[1])
    rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
    if not len(rows):
        return 0
    return int((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))


def _unique_keys(rows: list[Row]) -> list[str]:
    """`file_name`, with `@start` for later clips of a video and `#n` for a repeated clip."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        key = f"{row.file_name}@{row.start_s:g}" if row.start_s else row.file_name
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return keys


def _check_row(row: Row, *, frames: int, fps: float) -> str | None:
    """Decodes a row's clip and the labels of its frames; says if colours are read too pale."""
    has_masks = row.masks is not None
    clip = check_clip(row.video, frames=frames, fps=fps, start_s=row.start_s, seek=not has_masks)
    if has_masks:
        check_masks(row, clip.frame_indices, clip.source_size_HW)
    if clip.hdr is None:
        return None
    return (
        f"have HDR colours ({clip.hdr}), which are read as stored and hence pale: convert them to "
        "SDR (tone mapping)"
    )


def _image_check(path: Path) -> MediaCheck:
    return MediaCheck(f"image: {os.path.abspath(path)}", (path,), partial(_check_image, path))


def _check_image(path: Path) -> None:
    read_image(path)
