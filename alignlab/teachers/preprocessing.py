"""What a teacher's folder says of its pixels: scale, mean and deviation, size and resize filter."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.errors import UserError
from alignlab.teachers.registry import TeacherRow, Triple

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's numbers, which `resample` names."""
SAME_SCALE = 1e-6  # folders write 1/255 with more digits or fewer


@dataclass(frozen=True)
class Preprocessing:
    """How a teacher gets its pixels. Normalised are `(scale * p - mean) / std`, p in 0..1.

    Args:
        mean, std: by channel.
        scale: 1 unless the folder's `rescale_factor` is another than 1/255.
        size: (H, W) of the images that the folder asks for; None where it says none.
        resize: its filter; None where it says none.
        source: the file; None where the family's row speaks.
    """

    mean: Triple
    std: Triple
    scale: float = 1.0
    size: tuple[int, int] | None = None
    resize: str | None = None
    source: Path | None = None

    @property
    def normalisation(self) -> tuple[Triple, Triple, float]:
        """All that the features of frames which have their size already depend on."""
        return self.mean, self.std, self.scale

    def difference(self, given_HW: tuple[int, int], resize: str | None) -> str | None:
        """Says in one line where frames of a size differ from what the folder asks for.

        The harness gives frames the size that makes the requested grid, and the filter of the
        family's row, which comes from the papers' code.

        Args:
            given_HW: their pixels.
            resize: the filter that brought them there; None: they had that size already.
        """
        other_size = self.size is not None and self.size != given_HW
        other_filter = resize is not None and self.resize not in (None, resize)
        if not (other_size or other_filter):
            return None
        how = "as they are" if resize is None else f"resized with {resize}"
        asked = [] if self.size is None else [f"{self.size[0]}x{self.size[1]}"]
        asked += [] if self.resize is None else [self.resize]
        return (
            f"gets frames of {given_HW[0]}x{given_HW[1]}, {how}; "
            f"{self.source} says {', '.join(asked)}"
        )


def row_preprocessing(row: TeacherRow) -> Preprocessing:
    """The family's own."""
    return Preprocessing(row.mean, row.std)


def read_preprocessing(folder: Path, row: TeacherRow) -> tuple[Preprocessing, str | None]:
    """What the folder's processor config says; the row's values where it has none.

    Files are taken in transformers' order: what `processor_config.json` nests, for video families
    `video_preprocessor_config.json`, then `preprocessor_config.json`.

    Returns:
        It, and a warning for a file that says nothing of mean and deviation.

    Raises:
        UserError: the file is broken; one line that names it.
    """
    for path, values in _configs(folder, row):
        if not _is_on(path, values, "do_normalize"):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        elif values.get("image_mean") is None and values.get("image_std") is None:
            return row_preprocessing(row), (
                f"{path} has no image_mean and no image_std: pixels are normalised with the "
                f"family's, {list(row.mean)} and {list(row.std)}"
            )
        else:
            mean, std = (_channels(path, values, key) for key in ("image_mean", "image_std"))
        if min(std) <= 0:
            raise UserError(f"teachers: {path}: image_std {list(std)} must be above 0")
        size, resize = _size(values), _filter(values)
        return Preprocessing(mean, std, _scale(path, values), size, resize, path), None
    return row_preprocessing(row), None


def _configs(folder: Path, row: TeacherRow) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    nested = "video_processor" if row.video else "image_processor"
    names = ("video_preprocessor_config.json", "preprocessor_config.json")
    whole = folder / "processor_config.json"
    if whole.exists():
        values = _read(whole)
        if nested in values:
            yield whole, _object(whole, values[nested])
    for name in names if row.video else names[1:]:
        if (folder / name).exists():
            yield folder / name, _read(folder / name)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return _object(path, json.loads(path.read_text("utf-8")))
    except (ValueError, RecursionError) as error:  # also what is no UTF-8
        raise UserError(f"teachers: {path} is no JSON: {error}") from None
    except OSError as error:
        raise UserError(f"teachers: {path} cannot be read: {error.strerror}") from error


def _object(path: Path, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"teachers: {path} holds no settings of a processor, {{...}}")
    return values


def _is_on(path: Path, values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"teachers: {path}: {key} is {value!r}, not true or false")
    return value is not False


def _channels(path: Path, values: Mapping[str, Any], key: str) -> Triple:
    """Three numbers; one number is that of every channel, as in transformers."""
    value = values.get(key)
    listed = value if isinstance(value, list) else [value] * 3
    if len(listed) != 3 or not all(map(_is_number, listed)):
        raise UserError(f"teachers: {path}: {key} is {value!r}, not three numbers")
    red, green, blue = map(float, listed)
    return red, green, blue


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _scale(path: Path, values: Mapping[str, Any]) -> float:
    if not _is_on(path, values, "do_rescale"):
        return 255.0
    factor = values.get("rescale_factor")
    if factor is None:
        return 1.0
    if not _is_number(factor) or factor <= 0:
        raise UserError(f"teachers: {path}: rescale_factor is {factor!r}, not a number above 0")
    scale = 255.0 * factor
    return 1.0 if abs(scale - 1) < SAME_SCALE else scale


def _size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Of the images after the folder's own resizing and cropping, where it is the same for all."""
    for step, key in (("do_center_crop", "crop_size"), ("do_resize", "size")):
        size = values.get(key)
        if not values.get(step) or size is None:
            continue
        if isinstance(size, dict):
            height, width = size.get("height"), size.get("width")
        else:
            height = width = size
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return None


def _filter(values: Mapping[str, Any]) -> str | None:
    resample = values.get("resample")
    if resample is None or not values.get("do_resize", True):
        return None
    return FILTERS.get(resample, str(resample)) if isinstance(resample, int) else str(resample)
