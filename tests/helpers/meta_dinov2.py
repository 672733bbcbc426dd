"""Position embeddings of DINOv2 without registers at other sizes, by the formula of Meta's code."""

from typing import Any

import torch
from torch import Tensor


def with_meta_positions(model: Any) -> Any:
    """A `Dinov2Model` or backbone that resamples its embeddings as facebookresearch/dinov2."""
    if model.config.model_type != "dinov2":
        return model
    table_1LD = model.embeddings.position_embeddings
    side = round((table_1LD.shape[1] - 1) ** 0.5)
    patch = model.config.patch_size

    def resampled(tokens: Tensor, height: int, width: int) -> Tensor:
        rows, columns = height // patch, width // patch
        if (rows, columns) == (side, side):
            own: Tensor = table_1LD
            return own
        places = table_1LD[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factor = ((rows + 0.1) / side, (columns + 0.1) / side)
        found = torch.nn.functional.interpolate(places, scale_factor=factor, mode="bicubic")
        assert found.shape[2:] == (rows, columns)
        fitted: Tensor = torch.cat((table_1LD[:, :1], found.flatten(2).mT), dim=1)
        return fitted

    model.embeddings.interpolate_pos_encoding = resampled
    return model
