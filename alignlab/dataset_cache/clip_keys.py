"""Keys of what the frozen models make of a clip: all that each value depends on.

A value depends on what the clip's pixels (or its caption) are made from, on the files of the model,
on the dtype it runs in, the kind of device and the libraries, and on the code in between, which
`VERSIONS` counts. Nothing in the pixels is random: the same index of a data set always has the same
pixels, and augmentations would have to be parts of its origin.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from alignlab.dataset_cache.key import CacheKey, Kind, Part, digest_of

VERSIONS: dict[Kind, int] = {"text": 1, "video": 1, "reference": 1, "teacher": 1}
"""Of the code between a clip and a value. Raise one when that code gives other numbers: entries of
older code are then not read any more."""


ENVIRONMENT = ("libraries", "device", "threads", "build", "encoders")
"""Parts of a model that say where it ran, and not what it made a value of."""

DECODERS = ("decoders", "numpy")
"""Parts of a clip's origin that say likewise which packages made its pixels."""


@dataclass(frozen=True)
class ClipOrigin:
    """What a clip is made from, known without decoding it. Equal origins have equal pixels.

    Args:
        video: what the frames depend on: files, frame rate, size, code.
        references: the same of all reference images together.
    """

    video: Mapping[str, Part]
    references: Mapping[str, Part]


def text_key(text: str, encoder: Mapping[str, Part]) -> CacheKey:
    """Of the embedding of a text.

    Args:
        text: a caption or another prompt.
        encoder: what names the text encoder (`alignlab.models.wan.Wan.text_parts`).
    """
    return _key("text", {"text": text}, encoder)


def video_key(origin: ClipOrigin, vae: Mapping[str, Part]) -> CacheKey:
    """Of a clip's latents; `vae` names the autoencoder."""
    return _key("video", origin.video, vae)


def reference_key(origin: ClipOrigin, vae: Mapping[str, Part]) -> CacheKey:
    """Of the latents of all references of a clip."""
    return _key("reference", origin.references, vae)


def teacher_key(
    pixels: Mapping[str, Part], teacher: Mapping[str, Part], grid_HW: tuple[int, int]
) -> CacheKey:
    """Of a teacher's features of frames or reference images.

    Args:
        pixels: what they are made from.
        teacher: what names the teacher with its feature (`alignlab.teachers.Teacher.parts`).
        grid_HW: of patches that it is asked for.
    """
    return _key("teacher", {**pixels, "grid": tuple(grid_HW)}, teacher)


def content_digest(kind: str, parts: Mapping[str, object]) -> str:
    """Names what a value is of: the same whatever machine and packages made it."""
    left_out = {*DECODERS, *(f"model.{name}" for name in ENVIRONMENT)}
    return digest_of(kind, {name: part for name, part in parts.items() if name not in left_out})


@cache
def libraries(*names: str) -> str:
    """Names and versions of packages: another version may compute other last bits."""
    return ", ".join(f"{name} {version(name)}" for name in names)


def _key(kind: Kind, values: Mapping[str, Part], model: Mapping[str, Part]) -> CacheKey:
    parts = {**values, **{f"model.{name}": part for name, part in model.items()}}
    return CacheKey(kind, {**parts, "code": VERSIONS[kind]})
