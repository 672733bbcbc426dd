"""Fits a model's position embeddings to a token grid where transformers does not.

Shape letters: T tubelets, H height and W width in patches, D width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.losses.objective import Grid
from alignlab.teachers.registry import Positions

Fit = Callable[[Grid], None]


def position_fitter(model: Any, kind: Positions) -> Fit:
    """Returns what has to be called with the grid of every clip before the model is."""
    if kind == "offset":
        return _dinov2_offset(model)
    if kind == "table":
        return _videomae_table(model)
    if kind == "rope":
        return _vjepa2_rope(model)
    return lambda grid: None


def interpolate_table(table_THWD: Tensor, grid: Grid) -> Tensor:
    """Resamples position embeddings, bicubic in space, then linear in time (VideoREPA's code)."""
    frames, height, width = grid
    table = table_THWD.permute(0, 3, 1, 2)
    if table.shape[2:] != (height, width):
        table = F.interpolate(table, (height, width), mode="bicubic")
    if table.shape[0] != frames:
        table = table.permute(1, 0, 2, 3)[None]
        table = F.interpolate(table, grid, mode="trilinear")[0].permute(1, 0, 2, 3)
    return table.permute(0, 2, 3, 1)


OFFSET = 0.1
"""Patches that DINOv2's code adds to a grid before it divides by the trained one."""


def _dinov2_offset(model: Any) -> Fit:
    """DINOv2 without registers: bicubic, by the factor (grid + 0.1) / trained grid.

    Meta's code resamples at places that this factor gives, which the trained models' released
    features are of at every size but 518; transformers resamples to the grid's size, which are
    other places. With registers Meta's code does that as well, with antialiasing.
    """
    if model.config.model_type != "dinov2":
        return lambda grid: None
    embeddings = model.embeddings
    trained = math.isqrt(embeddings.position_embeddings.shape[1] - 1)
    own = type(embeddings).interpolate_pos_encoding

    def fit(grid: Grid) -> None:
        _, height, width = grid
        if (height, width) == (trained, trained):
            embeddings.interpolate_pos_encoding = partial(own, embeddings)
            return
        table_1LD = embeddings.position_embeddings
        square = table_1LD[:, 1:].float().unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
        factors = ((height + OFFSET) / trained, (width + OFFSET) / trained)
        resampled = F.interpolate(square, scale_factor=factors, mode="bicubic").flatten(2).mT
        fitted = torch.cat((table_1LD[:, :1], resampled.to(table_1LD.dtype)), dim=1)
        embeddings.interpolate_pos_encoding = lambda tokens, height, width: fitted

    return fit


def _videomae_table(model: Any) -> Fit:
    """VideoMAE: a fixed sinusoid over all tokens of the training size in one row.

    Such a row says nothing of other sizes (the same place would get another number), so it is
    interpolated; transformers refuses other sizes instead.
    """
    embeddings, config = model.embeddings, model.config
    patches = embeddings.patch_embeddings
    size = tuple(pixels // config.patch_size for pixels in patches.image_size)
    trained = (config.num_frames // config.tubelet_size, *size)
    table_THWD = embeddings.position_embeddings[0].unflatten(0, trained).float()

    def fit(grid: Grid) -> None:
        fitted = interpolate_table(table_THWD, grid).flatten(0, 2)[None]
        embeddings.position_embeddings = fitted.to(model.device)
        patches.image_size = (grid[1] * config.patch_size, grid[2] * config.patch_size)

    return fit


def _vjepa2_rope(model: Any) -> Fit:
    """V-JEPA 2: rotary embeddings of a token's frame, row and column.

    transformers derives the three from the token's number and the training size, so that another
    size would silently get wrong ones. The original code counts in the true grid, as is done here.
    """

    def fit(grid: Grid) -> None:
        frames, height, width = grid
        number = torch.arange(frames * height * width, device=model.device)
        places = (number // (height * width), number // width % height, number % width)
        for layer in model.encoder.layer:
            layer.attention.get_position_ids = lambda x, masks=None: places

    return fit
