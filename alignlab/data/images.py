"""Reference images and label images, read through Pillow.

Shape letters: H height, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from alignlab.data.decode import ClipError
from alignlab.data.resize import WHITE


def read_image(path: Path) -> tuple[Tensor, Tensor | None]:
    """Read an image as uint8 RGB on white, and its alpha channel as a mask.

    Returns:
        image `(H, W, 3)` uint8, upright (EXIF), composed on white; and a bool mask `(H, W)`,
        true where alpha is at least one half, or None when the image has no transparency.

    Raises:
        ClipError: unreadable file, or more than 8 bits per channel.
    """
    with _open_image(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            raise ClipError(f"{path}: has more than 8 bits per channel; convert it to 8-bit")
        has_alpha = image.has_transparency_data
        pixels_HWC = torch.from_numpy(np.array(image.convert("RGBA" if has_alpha else "RGB")))
    if not has_alpha:
        return pixels_HWC, None
    alpha_HW1 = pixels_HWC[..., 3:].float() / 255
    composed_HWC = pixels_HWC[..., :3].float() * alpha_HW1 + WHITE * (1 - alpha_HW1)
    return composed_HWC.round().to(torch.uint8), pixels_HWC[..., 3] >= 128


def read_labels(path: Path) -> Tensor:
    """Read a label image, palette or 8-bit gray, as uint8 `(H, W)` indices.

    Raises:
        ClipError: unreadable file, or an image in colour.
    """
    with _open_image(path) as image:
        if image.mode not in ("P", "L"):
            raise ClipError(f"{path}: must be a palette or 8-bit gray image, not {image.mode}")
        return torch.from_numpy(np.array(image))


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    # RuntimeError: of the AVIF decoder
    except (
        OSError,
        SyntaxError,
        ValueError,
        RuntimeError,
        Image.DecompressionBombError,
    ) as error:
        raise ClipError(f"{path}: cannot be read ({error})") from error
