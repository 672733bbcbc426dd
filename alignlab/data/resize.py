"""Aspect-preserving resizing of frames, masks and reference images.

Every resize here is torch's antialiased bicubic filter on uint8 pixels, so that clips and
references get the same treatment on every machine.
Shape letters: H height, W width, C channels.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

WHITE = 255


def _resize_bicubic(image_CHW: Tensor, size_HW: tuple[int, int]) -> Tensor:
    if tuple(image_CHW.shape[-2:]) == size_HW:
        return image_CHW
    return interpolate(image_CHW[None], size=size_HW, mode="bicubic", antialias=True)[0]


def cover_crop(image_CHW: Tensor, size_HW: tuple[int, int], *, pixel_aspect: float = 1.0) -> Tensor:
    """Resize a uint8 image until it covers `size_HW`, then crop its centre.

    Args:
        image_CHW: uint8, any number of channels (masks: 0 or 255).
        size_HW: output height and width.
        pixel_aspect: width of a stored pixel divided by its height (anamorphic video is not 1).

    Returns:
        uint8 `(C, *size_HW)`.
    """
    if image_CHW.dtype != torch.uint8 or image_CHW.ndim != 3:
        raise ValueError(f"expected uint8 (C, H, W), got {image_CHW.dtype} {image_CHW.shape}")
    height, width = image_CHW.shape[-2], image_CHW.shape[-1] * pixel_aspect
    scale = max(size_HW[0] / height, size_HW[1] / width)
    covering_HW = (max(round(height * scale), size_HW[0]), max(round(width * scale), size_HW[1]))
    resized_CHW = _resize_bicubic(image_CHW, covering_HW)
    top, left = (covering_HW[0] - size_HW[0]) // 2, (covering_HW[1] - size_HW[1]) // 2
    return resized_CHW[:, top : top + size_HW[0], left : left + size_HW[1]]


def fit_reference(
    image_HWC: Tensor, mask_HW: Tensor | None, size_HW: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Prepare a reference image as RefAlign's released code does.

    Aspect-preserving resize until the image fits into the clip's size, centred on white; the
    background given by the mask is white too.

    Args:
        image_HWC: uint8 RGB.
        mask_HW: bool, true on the subject; None means that the whole image is the subject.
        size_HW: height and width of the clip.

    Returns:
        image `(*size_HW, 3)` uint8, white wherever the mask is false, and mask `size_HW` bool
        (false on the padding).
    """
    if image_HWC.dtype != torch.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {image_HWC.dtype} {image_HWC.shape}")
    if mask_HW is None:
        mask_HW = torch.ones(image_HWC.shape[:2], dtype=torch.bool)
    if mask_HW.shape != image_HWC.shape[:2]:
        raise ValueError(f"mask {mask_HW.shape} does not match image {image_HWC.shape}")
    height, width = mask_HW.shape
    scale = min(size_HW[0] / height, size_HW[1] / width)
    fitted_HW = (max(1, round(height * scale)), max(1, round(width * scale)))
    # The background is whitened first so that the filter never mixes it into the subject's edge.
    whitened_HWC = torch.where(mask_HW[..., None], image_HWC, WHITE)
    planes_CHW = torch.cat([whitened_HWC.permute(2, 0, 1), mask_HW[None].to(torch.uint8) * 255])
    fitted_CHW = _resize_bicubic(planes_CHW, fitted_HW)

    top, left = (size_HW[0] - fitted_HW[0]) // 2, (size_HW[1] - fitted_HW[1]) // 2
    rows, columns = slice(top, top + fitted_HW[0]), slice(left, left + fitted_HW[1])
    mask_out_HW = torch.zeros(size_HW, dtype=torch.bool)
    mask_out_HW[rows, columns] = fitted_CHW[3] >= 128
    image_out_HWC = torch.full((*size_HW, 3), WHITE, dtype=torch.uint8)
    image_out_HWC[rows, columns] = fitted_CHW[:3].permute(1, 2, 0)
    image_out_HWC[~mask_out_HW] = WHITE
    return image_out_HWC, mask_out_HW
