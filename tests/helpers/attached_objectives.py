"""Objectives attached to a transformer of random weights, and clips to give them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab import Alignment, Clips
from alignlab.errors import UserError
from alignlab.losses.objective import Features

Attach = Callable[..., Alignment]
REPA: dict[str, Any] = {"name": "repa", "teacher": "mine", "blocks": [1], "projector_dim": 8}
REFALIGN: dict[str, Any] = {"name": "refalign", "teacher": "mine", "blocks": [0]}
FRAMES = torch.randint(0, 256, (2, 5, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
IMAGES = FRAMES[0, :1]


class Colours:
    """Mean colours of patches; `scale` 0 gives the same features whatever is seen."""

    dim, grid = 3, None

    def __init__(self, scale: float = 1.0, *, is_video: bool = False) -> None:
        self.scale, self.is_video = scale, is_video

    def encode(self, frames_BTHWC: Tensor, grid_HW: tuple[int, int]) -> Features:
        batch, frames = frames_BTHWC.shape[:2]
        pixels = frames_BTHWC.flatten(0, 1).movedim(3, 1).float() / 255
        tokens = nn.functional.adaptive_avg_pool2d(pixels, grid_HW).flatten(2).mT
        tokens = tokens * self.scale + (self.scale == 0)
        return Features(tokens.unflatten(0, (batch, frames)), (frames, *grid_HW))


def run(alignment: Alignment, model: nn.Module, *, frames: int = 2, batch: int = 2) -> None:
    with alignment.recording():
        model(torch.randn(batch, 4, frames, 4, 4), torch.full((batch,), 500.0), TEXT[:batch])


TEXT = torch.ones(3, 2, 8)


def clips(**fields: Any) -> Clips:
    known: dict[str, Any] = {
        "sigma_B": torch.full((2,), 0.5),
        "latent_shape": (2, 4, 4),
        "frames_BTHWC": FRAMES,
    }
    return Clips(**(known | fields))


def refused(pattern: str) -> Any:
    return pytest.raises(UserError, match=rf"^{pattern}[^\n]*$")
