"""Qwen2.5-VL's vision tower: images in, tokens in rows and columns out.

The tower takes patches of all images in one row, sorted so that each 2x2 block that its merger
joins, and each 8x8 window that most of its blocks attend in, lies together; it gives tokens in that
order. Every image is a clip of two equal frames, as its processor makes it.

Shape letters: N images, L tokens of one, D width, C channels, H height and W width in pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


class QwenVisionTower(nn.Module):
    """The tower with the interface of transformers' other vision models.

    Args:
        tower: transformers' `Qwen2_5_VisionTransformerPretrainedModel`.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.config = tower.config

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        device: torch.device = self.tower.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        dtype: torch.dtype = self.tower.dtype
        return dtype

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """Runs the tower on normalised images (N, C, H, W) of whole merged patches.

        Returns:
            `last_hidden_state` and `hidden_states` (N, L, D) before the merger, and `pooler_output`
            (N, L / 4, D of the language model) after it.
        """
        grid_N3 = self._grid(pixel_values)
        out = self.tower(
            patches(pixel_values, self.config),
            grid_thw=grid_N3,
            output_hidden_states=output_hidden_states,
        )
        order = self._places(grid_N3)
        states = out.hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=out.last_hidden_state[order],
            hidden_states=None if states is None else tuple(state[order] for state in states),
            pooler_output=out.pooler_output.unflatten(0, (len(pixel_values), -1)),
        )

    def _grid(self, pixels_NCHW: Tensor) -> Tensor:
        height, width = (side // self.config.patch_size for side in pixels_NCHW.shape[2:])
        grid = torch.tensor([1, height, width], device=pixels_NCHW.device)
        return grid.expand(len(pixels_NCHW), 3)

    def _places(self, grid_N3: Tensor) -> Tensor:
        """Where each token lies in what the tower gives, (N, L), by rows and columns."""
        from transformers.vision_utils import get_vision_window_index

        config, merge = self.config, self.config.spatial_merge_size
        blocks, _ = get_vision_window_index(
            grid_N3,
            spatial_merge_size=merge,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        count, (_, height, width) = len(grid_N3), grid_N3[0].tolist()
        of_blocks = torch.argsort(blocks).to(grid_N3.device)[:, None] * merge**2
        places = of_blocks + torch.arange(merge**2, device=grid_N3.device)
        places = places.view(count, height // merge, width // merge, merge, merge)
        in_rows: Tensor = places.transpose(2, 3).reshape(count, height * width)
        return in_rows


def patches(pixels_NCHW: Tensor, config: Any) -> Tensor:
    """Pixels of the patches of all images, as `Qwen2VLImageProcessor` sorts them."""
    patch, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    blocks: Tensor = pixels_NCHW.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
    # image, row of blocks, column of blocks, row and column in the block, channel, row and column
    sorted_pixels = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    repeated = sorted_pixels[..., None, :, :].expand(*(-1,) * 6, frames, -1, -1)
    flat: Tensor = repeated.flatten(5).flatten(0, 4)
    return flat
