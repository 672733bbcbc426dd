"""Data sets of other packages: what they write, and how what they give is looked at.

docs/own-data.md is the way to one. Shape letters: T frames, H height, W width, C channels (RGB),
E entities.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from alignlab.config.data import (
    Ahead,
    CacheConfig,
    ClipsConfig,
    FrameRate,
    Frames,
    Limits,
    Size,
    Workers,
)
from alignlab.data.sample import DataFiles, Reference, Sample
from alignlab.dataset_cache.clip_keys import ClipOrigin
from alignlab.dataset_cache.key import CacheKey, Part
from alignlab.errors import UserError
from alignlab.foreign_code import call_foreign
from alignlab.progress import warn_once

Split = Literal["train", "val"]

NO_PIXELS = {"cache", "workers", "prefetch"}
"""Settings that no clip depends on."""


class OwnClipsConfig(ClipsConfig):
    """Settings that every data set has; a package's adds `name` and those of its own.

    With `clips_are_cached: ClassVar[bool] = False` only captions are kept in the dataset cache: for
    a class of clips that cannot say what they are made from (`OwnClips.origin`).
    """

    frames: Frames = 9
    """Frames per clip, 4k+1."""
    size: Size = (64, 64)
    """(height, width) in pixels, multiples of 16."""
    fps: FrameRate = 8
    """Frame rate of the clips, and of generated ones."""
    references: Limits = (0, 3)
    """Fewest and most reference images per clip."""
    cache: CacheConfig = CacheConfig()
    """What encoders and teachers make of clips, kept on disk."""
    workers: Workers = 0
    """Threads that make the next batches while a step runs; 0: each is made when it is needed.
    Changes no number."""
    prefetch: Ahead | None = None
    """Micro-batches that `workers` make ahead of the one that is trained on. Left out: 2, or as
    many as there are workers."""


class OwnClips(ABC):
    """The clips of a split, as a package gives them. Its class names its `Config`.

    Clips are addressed by index; the same index always gives the same bits. Threads may ask at once
    (`data.workers`). A user's mistake is an `alignlab.errors.UserError`.

    Args:
        config: an instance of `Config`.
        split: which clips.
    """

    Config: ClassVar[type[OwnClipsConfig]]

    def __init__(self, config: Any, split: Split) -> None:
        self.config = config
        self.split = split

    @abstractmethod
    def __len__(self) -> int:
        """How many clips the split has, at least one."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """A clip: `config.frames` frames of `config.size`."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """The caption of a clip; asked of every clip before a training, so it reads no video."""

    def origin(self, index: int) -> Mapping[str, Part] | None:
        """What a clip and its references are made from, by name: digests of files, an index, a
        version of the code. Equal origins under equal settings have equal pixels."""
        return None

    def key(self, index: int) -> str:
        """A stable name of a clip inside its data set."""
        return f"{self.split}/{index}"

    def references(self, index: int) -> tuple[Reference, ...]:
        """The references of a clip; to be overridden where the video is not needed for them."""
        return self[index].references

    def names(self, index: int) -> tuple[str, ...]:
        """The names of the references; asked of every clip where `data.references` may be 0."""
        return tuple(reference.name for reference in self.references(index))

    def entities(self, index: int) -> tuple[str, ...]:
        """The phrases of the masked subjects; empty where masks are not known."""
        return ()

    @staticmethod
    def files(config: Any) -> DataFiles | None:
        """The files that clips are read from: a run on changed ones is refused. None for generated
        clips, and while the files are not there."""
        return None


class CheckedClips:
    """A package's clips as a `ClipDataset`: what they give is looked at, and told with its package.

    Args:
        clips: theirs.
        package: with its version.

    Raises:
        UserError: there is no clip, or the first is none.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, clips: OwnClips, package: str) -> None:
        self._clips = clips
        self._config: OwnClipsConfig = clips.config
        self._package = package
        self._what = f"data {self._config.name} ({package}), split {clips.split}"
        own = type(clips)
        # else they are those of the clip, which would be made once more to be compared with itself
        self._names_are_own = (
            own.names is not OwnClips.names or own.references is not OwnClips.references
        )
        self._count: int = self._called("its length", len, clips)
        if self._count < 1:
            raise UserError(f"{self._what}: has {self._count} clips, not one or more")
        first, again = self[0], self[0]
        if not torch.equal(first.video_THWC, again.video_THWC):
            raise UserError(
                f"{self._what}: clip 0 has other frames each time it is asked for: the same index "
                "must give the same bits (what is drawn takes a seed from the index)"
            )
        if not self._config.clips_are_cached and clips.split == "train":
            self.notes = (
                f"data {self._config.name}: its clips do not say what they are made from "
                "(OwnClips.origin), so that the dataset cache keeps captions alone: clips are "
                "encoded anew, and teachers run at every step",
            )
            warn_once(self.notes[0])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        sample = self._called(f"clip {index}", self._clips.__getitem__, index)
        problem = self._problem(sample, index)
        if problem is not None:
            raise UserError(f"{self._what}: clip {index}: {problem}")
        assert isinstance(sample, Sample)
        return sample

    def caption(self, index: int) -> str:
        """The caption of a clip."""
        return self._text("caption", self._clips.caption, index)

    def key(self, index: int) -> str:
        """The key of a clip."""
        return self._text("key", self._clips.key, index)

    def entities(self, index: int) -> tuple[str, ...]:
        """What the masked subjects of a clip are called."""
        return self._texts("entities", self._clips.entities, index)

    def names(self, index: int) -> tuple[str, ...]:
        """The names of the references of a clip."""
        return self._texts("names", self._clips.names, index)

    def references(self, index: int) -> tuple[Reference, ...]:
        """The references of a clip."""
        found = self._called(f"references of clip {index}", self._clips.references, index)
        problem = self._reference_problem(found)
        if problem is not None:
            raise UserError(f"{self._what}: clip {index}: {problem}")
        references: tuple[Reference, ...] = found
        return references

    def origin(self, index: int) -> ClipOrigin:
        """What a clip is made from, with the package's version and all settings that may matter.

        A class that cannot say it has its clips named by their keys, which is in no entry of the
        dataset cache (`ClipsConfig.clips_are_cached`).
        """
        what = f"origin of clip {index}"
        parts = self._called(what, self._clips.origin, index)
        if not self._config.clips_are_cached:
            parts = {"clip": self.key(index), "split": self._clips.split}
        settings = self._config.model_dump(mode="json", exclude=NO_PIXELS)
        own = {
            "data": self._config.name,
            "package": self._package,
            "settings": json.dumps(settings, sort_keys=True),
        }
        if not isinstance(parts, Mapping) or not parts:
            raise UserError(f"{self._what}: {what}: gave {parts!r}, not named parts")
        try:
            named = {**{f"own.{name}": part for name, part in parts.items()}, **own}
            CacheKey("video", named)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._what}: {what}: {error}") from None
        return ClipOrigin(named, named)

    def without_masks(self) -> str | None:
        """Key of the first clip whose entity masks are unknown; None if there is no such clip."""
        unmasked = (i for i in range(len(self)) if not self.entities(i))
        return next((self.key(i) for i in unmasked), None)

    def share_with_references(self) -> float:
        """Share of the clips that have a reference image."""
        return self._share

    @cached_property
    def _share(self) -> float:
        fewest, most = self._config.references
        if fewest or not most:
            return float(fewest > 0)
        return sum(bool(self.names(i)) for i in range(len(self))) / len(self)

    def _problem(self, sample: object, index: int) -> str | None:
        """What is wrong with a sample, or None."""
        if not isinstance(sample, Sample):
            return f"is a {type(sample).__name__}, no alignlab.data.sample.Sample"
        frames, size = self._config.frames, tuple(self._config.size)
        problem = _tensor_problem("video_THWC", sample.video_THWC, (frames, *size, 3), torch.uint8)
        problem = problem or self._reference_problem(sample.references)
        if problem is not None:
            return problem
        told = {"caption": self.caption, "key": self.key, "entities": self.entities}
        for name, tell in told.items():
            if (value := getattr(sample, name)) != tell(index):
                return f"has {name} {value!r}, and {name}({index}) gives {tell(index)!r}"
        names = tuple(one.name for one in sample.references)
        if self._names_are_own and names != self.names(index):
            return f"has references of other names than names({index}) gives"
        if bool(sample.entities) != (sample.masks_ETHW is not None):
            return "has entities and no masks_ETHW, or masks of no entities"
        if sample.undecided_THW is not None and sample.masks_ETHW is None:
            return "has undecided_THW and no masks_ETHW"
        shape = (len(sample.entities), frames, *size)
        flow = (frames - 1, *size, 2)
        return _optional_problem("masks_ETHW", sample.masks_ETHW, shape, torch.bool) or (
            _optional_problem("flow_THWC", sample.flow_THWC, flow, torch.float32)
            or _optional_problem("undecided_THW", sample.undecided_THW, shape[1:], torch.bool)
        )

    def _reference_problem(self, references: object) -> str | None:
        if not isinstance(references, tuple) or not all(
            isinstance(one, Reference) for one in references
        ):
            return "has references that are no tuple of alignlab.data.sample.Reference"
        fewest, most = self._config.references
        if not fewest <= len(references) <= most:
            return f"has {len(references)} references, data.references asks for {fewest} to {most}"
        size = tuple(self._config.size)
        for place, one in enumerate(references):
            problem = _tensor_problem("image_HWC", one.image_HWC, (*size, 3), torch.uint8)
            problem = problem or _tensor_problem("mask_HW", one.mask_HW, size, torch.bool)
            if problem is None and not all(
                isinstance(text, str) and text for text in (one.name, one.phrase)
            ):
                problem = "has no name or no phrase"
            if problem is not None:
                return f"reference {place}: {problem}"
        return None

    def _text(self, name: str, function: Callable[[int], Any], index: int) -> str:
        text = self._called(f"{name} of clip {index}", function, index)
        if not isinstance(text, str):
            raise UserError(f"{self._what}: {name} of clip {index}: gave {text!r}, no text")
        return text

    def _texts(self, name: str, function: Callable[[int], Any], index: int) -> tuple[str, ...]:
        texts = self._called(f"{name} of clip {index}", function, index)
        if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{self._what}: {name} of clip {index}: gave {texts!r}, no tuple of texts"
            )
        return texts

    def _called(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return call_foreign(f"{self._what}: {what}", function, *arguments)


def _optional_problem(
    name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    return None if value is None else _tensor_problem(name, value, shape, dtype)


def _tensor_problem(
    name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    if not isinstance(value, Tensor):
        return f"has a {type(value).__name__} for {name}, no tensor"
    if tuple(value.shape) != shape or value.dtype != dtype or value.device.type != "cpu":
        have = f"{tuple(value.shape)} in {value.dtype} on {value.device}"
        return f"has {name} {have}, not {shape} in {dtype} on cpu"
    return None
