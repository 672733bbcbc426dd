"""Settings of the data sets. Letters: H height, W width, T frames."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from alignlab.config.limits import at_most, refuse_unusable
from alignlab.config.names import check_name
from alignlab.config.written_names import refuse_written
from alignlab.errors import shown
from alignlab.progress import warn_once

LATENT_STRIDE = 4  # frames per latent frame of the Wan VAE, after the first
# VAE stride 8 times the transformer's patch 2. Models with larger tokens, such as Wan 2.2 TI2V-5B
# of 32 pixels, are asked when they are looked at (`FrozenParts.token_grid`).
SIZE_STEP = 16
MAX_SIDE = 8192
MAX_REFERENCES = 64  # each is a whole latent frame of tokens


class Settings(BaseModel):
    """Base of every config: immutable, unknown keys refused, field docstrings kept."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        refuse_unusable(value)
        return value


def unknown_name(kind: str, name: str, valid: Iterable[str], *, of_packages: bool = False) -> str:
    """ "unknown <kind> 'x', did you mean 'y'? valid: ..." for a name that is not in `valid`.

    Args:
        kind: what it names.
        name: as it was given.
        valid: the names that there are.
        of_packages: installed packages add to these; that none has this one is said.
    """
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ","
    none_has = f" (no installed package has {shown(name)})" if of_packages else ""
    listed = ", ".join(names) or "none defined"
    return f"unknown {kind} {shown(name)}{hint} valid: {listed}{none_has}"


def _whole_latent_frames(frames: int) -> int:
    if (frames - 1) % LATENT_STRIDE:
        below = 1 + (frames - 1) // LATENT_STRIDE * LATENT_STRIDE
        raise ValueError(
            f"{frames} frames do not fill whole latent frames (4k+1): "
            f"use {below} or {below + LATENT_STRIDE}"
        )
    return frames


def _whole_patches(size: tuple[int, int]) -> tuple[int, int]:
    if any(side < SIZE_STEP or side % SIZE_STEP for side in size):
        nearest = [max(SIZE_STEP, round(side / SIZE_STEP) * SIZE_STEP) for side in size]
        raise ValueError(
            f"{list(size)} must be multiples of {SIZE_STEP} (height, width): nearest is {nearest}"
        )
    if max(size) > MAX_SIDE:
        raise ValueError(f"{list(size)}: {max(size)} is more than {MAX_SIDE} pixels a side")
    return size


def _low_to_high(limits: tuple[int, int]) -> tuple[int, int]:
    low, high = limits
    if not 0 <= low <= high:
        raise ValueError(f"{list(limits)} must be [fewest, most] with 0 <= fewest <= most")
    if high > MAX_REFERENCES:
        raise ValueError(f"{list(limits)}: {high} is more than {MAX_REFERENCES} reference images")
    return limits


def _folder_name(name: str, info: ValidationInfo) -> str:
    for part in name.split("/"):
        try:
            check_name(part)
        except ValueError as error:
            raise ValueError(
                f"{shown(name)} must be a folder inside `output`, with / between folders: {error}"
            ) from None
    if not (info.context or {}).get("stored"):  # a run of an older version may have any name
        refuse_written(name)
    return name


RunName = Annotated[str, AfterValidator(_folder_name)]
Frames = Annotated[
    int,
    Field(ge=1),
    at_most(4097, "a clip of minutes does not fit into memory"),
    AfterValidator(_whole_latent_frames),
]
Size = Annotated[tuple[int, int], AfterValidator(_whole_patches)]
FrameRate = Annotated[int, Field(ge=1), at_most(1000, "no video has that many frames a second")]
ClipCount = Annotated[int, Field(ge=1), at_most(10**9, "clips are counted one by one")]
Limits = Annotated[tuple[int, int], AfterValidator(_low_to_high)]
Workers = Annotated[int, Field(ge=0), at_most(256, "threads share one set of encoders")]
Ahead = Annotated[int, Field(ge=1), at_most(1024, "each is kept in memory, with its features")]


class CacheConfig(Settings):
    """What the frozen encoders and teachers make of clips, kept on disk (docs/data.md).

    At full precision it changes no number of a run.
    """

    mode: Literal["off", "read", "write", "require"] = "write"
    """`write`: read what is there, and keep what is not; `read`: keep nothing new; `require`:
    refuse what is not there, so that nothing is encoded; `off`: encode at every step."""
    path: str | None = None
    """Folder of the cache. Left out: `cache` in `output`, which all runs there share."""
    texts: bool = True
    """Keep the text embeddings of captions."""
    latents: bool = True
    """Keep the latents of videos and references."""
    teachers: bool = True
    """Keep the features of teachers."""
    dtype: Literal["fp32", "bf16", "fp8", "int8"] = "fp32"
    """In which the features of teachers are kept. Any but `fp32` rounds them, also where nothing is
    cached yet: it is part of what a run is, and variants of a comparison share it."""

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_text(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML reads a bare `off` as false

    @model_validator(mode="after")
    def _dtype_is_read(self) -> Self:
        if self.dtype != "fp32" and (self.mode == "off" or not self.teachers):
            why = "mode: off" if self.mode == "off" else "teachers: false"
            raise ValueError(f"dtype: nothing reads {self.dtype} with {why}; remove it")
        return self


class ClipsConfig(Settings):
    """Base of every data set's settings; which there are: `alignlab.data.registry.DATASETS`."""

    if TYPE_CHECKING:  # every data set declares these, with defaults of its own
        name: str
        frames: int
        size: tuple[int, int]
        fps: int
        references: tuple[int, int]
        cache: CacheConfig
        workers: int
        prefetch: int | None

    subjects_by_colour: ClassVar[bool] = False
    """Whether a caption names each subject by a colour of the world of `shapes` that no other
    subject of the clip has: `alignlab.data.shapes.detect` then finds it in any clip."""

    clips_are_cached: ClassVar[bool] = True
    """Whether clips can say what they are made from. Else the dataset cache keeps captions alone:
    `cache.latents` and `cache.teachers` are false."""

    @model_validator(mode="before")
    @classmethod
    def _only_captions_are_cached(cls, values: Any) -> Any:
        """Turns off what would have no key."""
        if cls.clips_are_cached or not isinstance(values, dict):
            return values
        given = values.get("cache", {})
        if isinstance(given, CacheConfig):
            given = given.model_dump(exclude_unset=True)
        if not isinstance(given, dict):
            return values  # is refused for what it is
        why = "the clips of this data set do not say what they are made from; remove it"
        for kind in ("latents", "teachers"):
            if given.get(kind) not in (None, False):
                raise ValueError(f"cache.{kind}: {why}")
        if given.get("mode") == "require":
            raise ValueError(f"cache.mode: require: {why}")
        return {**values, "cache": {**given, "latents": False, "teachers": False}}

    @model_validator(mode="before")
    @classmethod
    def _no_clip_count(cls, values: Any, info: ValidationInfo) -> Any:
        """Drops `cache_clips` of an older version, which changed no number."""
        if not isinstance(values, dict) or "cache_clips" not in values:
            return values
        if not (info.context or {}).get("stored"):
            warn_once(
                "data.cache_clips: nothing reads it any more; data.cache took its place, and keeps "
                "on disk what is encoded (data.cache.mode=off encodes at every step)"
            )
        return {key: value for key, value in values.items() if key != "cache_clips"}

    @model_validator(mode="after")
    def _prefetch_is_read(self) -> Self:
        if self.prefetch is not None and not self.workers:
            raise ValueError(
                f"prefetch: nothing reads {self.prefetch} without threads that make batches ahead; "
                "set data.workers to 1 or more, or remove it"
            )
        if self.prefetch is not None and self.prefetch < self.workers:
            raise ValueError(
                f"workers: {self.workers} threads, and prefetch: {self.prefetch} micro-batches at "
                "a time give work to no more than that many; lower data.workers, or raise "
                "data.prefetch"
            )
        return self

    @property
    def num_val_clips(self) -> int | None:
        """Size of the val split, where the settings alone say it."""
        return None


MAX_SUBJECTS = 4  # of a clip of `shapes`: each begins in a quarter of its own


def _no_more_than_subjects(limits: tuple[int, int]) -> tuple[int, int]:
    if limits[1] > MAX_SUBJECTS:
        raise ValueError(
            f"{list(limits)} asks for more references than a clip of shapes has subjects, "
            f"{MAX_SUBJECTS}"
        )
    return limits


class ShapesConfig(ClipsConfig):
    """The generated data set: textured subjects that move as the caption says."""

    subjects_by_colour: ClassVar[bool] = True

    name: Literal["shapes"] = "shapes"
    frames: Frames = 9
    """Frames per clip, 4k+1 (the VAE packs four frames into one latent frame after the first)."""
    size: Size = (64, 64)
    """(height, width) in pixels, multiples of 16."""
    fps: FrameRate = 8
    """Frame rate at which clips and generated videos are written."""
    references: Annotated[Limits, AfterValidator(_no_more_than_subjects)] = (2, 3)
    """Fewest and most reference images per clip, at most 4."""
    train_clips: ClipCount = 512
    """Size of the train split."""
    val_clips: ClipCount = 32
    """Size of the val split."""
    cache: CacheConfig = CacheConfig()
    """What encoders and teachers make of clips, kept on disk."""
    workers: Workers = 0
    """Threads that make the next batches while a step runs; 0: each is made when it is needed.
    Changes no number."""
    prefetch: Ahead | None = None
    """Micro-batches that `workers` make ahead of the one that is trained on. Left out: 2, or as
    many as there are workers."""
    seed: int = Field(default=0, ge=0)
    """Seed of the world. It is not the run's seed: all seeds of a comparison share the data."""

    @property
    def num_val_clips(self) -> int:
        """Size of the val split."""
        return self.val_clips


class FolderConfig(ClipsConfig):
    """A folder of videos with a metadata file (see docs/data.md for its columns)."""

    name: Literal["folder"] = "folder"
    path: str
    """The folder; paths in the metadata are relative to it."""
    metadata: str = "metadata.jsonl"
    """Metadata file inside the folder: .jsonl, .json or .csv."""
    frames: Frames = 81
    """Frames per clip, 4k+1. 81 is Wan 2.1's and RefAlign's."""
    size: Size = (480, 832)
    """(height, width) in pixels, multiples of 16; with Wan 2.2 TI2V-5B of 32. 480x832 is Wan 2.1
    1.3B's and RefAlign's."""
    fps: FrameRate = 16
    """Frame rate to which videos are resampled. 16 is Wan 2.1's."""
    references: Limits = (0, 3)
    """Fewest and most reference images per clip. RefAlign keeps at most 3. Of a row with more,
    the largest crops are taken (docs/data.md)."""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the videos, or of the groups, held out as the val split: rounded, at least one. Not
    read where rows say their split."""
    split_rule: Literal["rank"] = "rank"
    """How videos are dealt to the splits: by the rank of a hash, the one rule there is. A run that
    an older version began, by another rule, does not say so, and is not resumed."""
    follow_links: bool = False
    """Read videos, references and masks through links that lead out of the folder."""
    cache: CacheConfig = CacheConfig()
    """What encoders and teachers make of clips, kept on disk."""
    workers: Workers = 0
    """Threads that make the next batches while a step runs; 0: each is made when it is needed.
    Changes no number."""
    prefetch: Ahead | None = None
    """Micro-batches that `workers` make ahead of the one that is trained on. Left out: 2, or as
    many as there are workers."""
    on_bad_video: Literal["error", "skip"] = "error"
    """What to do with a row whose video, references or masks are missing, damaged or too few/short.
    All are decoded before training."""
