"""RefAlign's augmentations of references that are cut out of the clip itself.

Their constants stand in RefAlign's released repository alone, and there in the compiled module of
the data set (github.com/gudaochangsheng/RefAlign at 6f91526: `utils_os2v`, whose source is an empty
file). The paper names the kinds.
Array letters: H height, W width, C channels (RGB, or RGB and alpha).
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError

from alignlab.config.data import Settings, unknown_name
from alignlab.errors import UserError

Picture = NDArray[np.uint8]
Matrix = NDArray[np.float64]

TRIES = 20


class Augmentations(Settings):
    """How far a reference is changed; each amount is drawn evenly up to it, anew for each crop.

    The defaults are RefAlign's: its code gives them where it makes the data set. 0 is never.
    """

    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring left and right. Code."""
    rotation: float = Field(default=45.0, ge=0, le=180)
    """Degrees, either way. Code; the default of its class is 20."""
    shear: float = Field(default=10.0, ge=0, lt=45)
    """Degrees along x, and as many along y, each either way. Code."""
    scale: float = Field(default=0.1, ge=0, lt=1)
    """Sizes between 1 - scale and 1 + scale. Code; the default of its class is 0.2."""
    shift: float = Field(default=0.05, ge=0, lt=1)
    """Share of the sides, either way. Code."""
    perspective: float = Field(default=0.3, ge=0, le=1)
    """How far corners move inwards at most, as a share of half the sides. Code."""
    perspective_share: float = Field(default=0.5, ge=0, le=1)
    """Probability of a perspective. Code."""
    blur: float = Field(default=0.02, ge=0, le=1)
    """Largest side of the Gaussian kernel, as a share of the longer side. Code (its 50th part)."""
    colour: float = Field(default=0.05, ge=0, le=1)
    """Added to red, green and blue, each by itself, either way; white is 1. Code."""
    brightness: float = Field(default=0.1, ge=0, le=1)
    """Factors between 1 - brightness and 1 + brightness. Code."""


def read_augmentations(text: str) -> Augmentations | None:
    """`none`, `refalign`, or `refalign,rotation=20,blur=0` with other values for some settings.

    Raises:
        UserError: anything else.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name not in ("none", "refalign"):
        raise UserError(f"--augment: {unknown_name('augmentation', name, ('none', 'refalign'))}")
    if name == "none":
        if changes:
            raise UserError(f"--augment: nothing reads {changes[0]!r} with none; remove it")
        return None
    values: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if key not in Augmentations.model_fields:
            raise UserError(
                f"--augment: {unknown_name('setting', key, Augmentations.model_fields)}"
            )
        if not equals:
            raise UserError(f"--augment: {change!r} has no value: write {key}=NUMBER")
        values[key] = value
    try:
        return Augmentations(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--augment: {first['loc'][0]}: {first['msg']}") from None


def augmented(
    crop_HWC: Picture, settings: Augmentations, generator: torch.Generator
) -> tuple[Picture, dict[str, Any]]:
    """A changed reference of the same size, and what was drawn for it.

    Flip, perspective and the affine map about the centre are one resampling (bilinear); then come
    blur, colours and brightness, in the order of RefAlign's code. As there, what is turned or moved
    out of the picture is cut off. Other than there, the background stays white and transparent:
    colours and brightness change the subject alone.

    Args:
        crop_HWC: RGBA, white where it is transparent.
        settings: see there.
        generator: of the draws.

    Returns:
        the picture, and what was drawn; as it was, and nothing, in the case that in `TRIES` draws
        all of the subject was moved out of the picture.
    """
    for _ in range(TRIES):
        drawn = _draw(crop_HWC.shape[:2], settings, generator)
        picture_HWC = _apply(crop_HWC, drawn)
        if (picture_HWC[..., 3] > 0).any():
            return picture_HWC, drawn
    return crop_HWC, {}


def _draw(
    size_HW: tuple[int, ...], settings: Augmentations, generator: torch.Generator
) -> dict[str, Any]:
    height, width = size_HW

    def unit() -> float:
        return float(torch.rand((), generator=generator, dtype=torch.float64))

    def either_way(most: float) -> float:
        return round((2 * unit() - 1) * most, 4)

    largest_kernel = round(settings.blur * max(height, width))
    kernels = max(1, (largest_kernel + 1) // 2)  # of an odd side
    drawn: dict[str, Any] = {
        "flip": unit() < settings.flip,
        "rotation": either_way(settings.rotation),
        "shear": [either_way(settings.shear), either_way(settings.shear)],
        "scale": round(1 + either_way(settings.scale), 4),
        "shift": [either_way(settings.shift), either_way(settings.shift)],
        "kernel": 1 + 2 * min(kernels - 1, int(unit() * kernels)),
        "colour": [either_way(settings.colour) for _ in range(3)],
        "brightness": round(1 + either_way(settings.brightness), 4),
    }
    has_perspective, corners = unit() < settings.perspective_share, _corners(settings, unit)
    return drawn | ({"perspective": corners} if has_perspective else {})


def _corners(settings: Augmentations, unit: Callable[[], float]) -> list[list[float]]:
    """How far each corner moves inwards, as shares of the sides: x and y of the upper left, upper
    right, lower right and lower left one."""
    most = unit() * settings.perspective / 2
    return [[round(unit() * most, 4), round(unit() * most, 4)] for _ in range(4)]


def _apply(crop_HWC: Picture, drawn: dict[str, Any]) -> Picture:
    height, width = crop_HWC.shape[:2]
    back = np.linalg.inv(_map(height, width, drawn))
    place = (back / back[2, 2]).flatten()[:8].tolist()

    def moved(plane: Image.Image, background: int | tuple[int, int, int]) -> Image.Image:
        return plane.transform(
            (width, height),
            Image.Transform.PERSPECTIVE,
            data=place,
            resample=Image.Resampling.BILINEAR,
            fillcolor=background,
        )

    colours_HWC = np.array(moved(Image.fromarray(crop_HWC[..., :3]), (255, 255, 255)))
    mask_HW = np.array(moved(Image.fromarray(crop_HWC[..., 3]), 0)) >= 128
    if drawn["kernel"] > 1:  # the standard deviation is OpenCV's, which is torchvision's as well
        colours_HWC = cv2.GaussianBlur(colours_HWC, (drawn["kernel"],) * 2, 0).astype(np.uint8)
    lit_HWC = np.clip(colours_HWC / 255 + np.array(drawn["colour"]), 0, 1) * drawn["brightness"]
    picture_HWC = np.full((height, width, 4), 255, np.uint8)
    picture_HWC[..., 3] = np.where(mask_HW, 255, 0)
    lit_HWC = (np.clip(lit_HWC, 0, 1) * 255).round().astype(np.uint8)
    picture_HWC[..., :3] = np.where(mask_HW[..., None], lit_HWC, 255)
    return picture_HWC


def _map(height: int, width: int, drawn: dict[str, Any]) -> Matrix:
    """Where a place (x, y, 1) of the crop comes to lie."""
    flip = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) if drawn["flip"] else np.eye(3)
    turn = np.deg2rad(drawn["rotation"])
    along_x, along_y = np.tan(np.deg2rad(drawn["shear"]))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = np.eye(3)
    linear[:2, :2] = drawn["scale"] * rotation @ np.array([[1, along_x], [along_y, 1]])
    centre, size = np.eye(3), np.array([width, height])
    centre[:2, 2] = size / 2
    moved = np.eye(3)
    moved[:2, 2] = np.array(drawn["shift"]) * size
    affine = moved @ centre @ linear @ np.linalg.inv(centre)
    return np.asarray(affine @ _perspective(height, width, drawn) @ flip, np.float64)


def _perspective(height: int, width: int, drawn: dict[str, Any]) -> Matrix:
    if "perspective" not in drawn:
        return np.eye(3)
    size = np.array([width, height], np.float32)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float32)
    moved = corners + inwards * np.array(drawn["perspective"], np.float32)
    return np.asarray(cv2.getPerspectiveTransform(corners * size, moved * size), np.float64)
