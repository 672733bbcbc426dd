"""MoAlign's Stage 1 motion head (arXiv 2510.19022): a narrow motion space from teacher tokens.

Trained once to explain optical flow (`alignlab stage1 moalign`), then frozen inside the Stage 2
objective, which uses the motion space alone. That it is narrow and has to explain flow is what
takes appearance out of it.
Shape letters: B batch, T frames, P = H*W tokens per frame, D width of the teacher, M width of the
motion space. A grid is (T, H, W).
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from alignlab.kernels.cosine import accumulation_dtype
from alignlab.losses.grids import Grid
from alignlab.losses.projector import draw_initial_weights


def flow_l1(pred_BTPC: Tensor, target_BTPC: Tensor) -> Tensor:
    """Computes the mean absolute error over a sample's steps, tokens and both directions, (B,).

    Computed in float32 (float64 from float64) whatever the input dtype.

    Raises:
        ValueError: the two shapes differ, or there is no step.
    """
    if pred_BTPC.shape != target_BTPC.shape or not pred_BTPC.numel():
        raise ValueError(
            f"need equal shapes with a step, got {tuple(pred_BTPC.shape)} and "
            f"{tuple(target_BTPC.shape)}"
        )
    dtype = accumulation_dtype(pred_BTPC)
    return (pred_BTPC.to(dtype) - target_BTPC.to(dtype)).abs().flatten(1).mean(1)


class MotionHeadConfig(BaseModel):
    """Shape of a motion head.

    Args:
        teacher_dim: width of the teacher's tokens.
        width: of the motion space, 64 (paper).
        hidden: width of the convolution before it, 256 (ours; the paper does not give it).
        decoder: width of the flow decoder, 128 (ours; the paper does not give it).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_dim: int = Field(ge=1)
    width: int = Field(default=64, ge=1)
    hidden: int = Field(default=256, ge=1)
    decoder: int = Field(default=128, ge=1)


class MotionHead(nn.Module):
    """3D convolutions into the motion space, and a decoder from its changes in time to flow.

    Kernels are ours (the paper says 3D convolution and no more): 3x3x3 into `hidden`, 1x1x1 into
    the motion space, 3x3x3 and 1x1x1 from its temporal differences to flow. Borders are padded
    with zeros, so any grid can be asked for.

    Args:
        config: see `MotionHeadConfig`.
        seed: of the initial weights.
    """

    def __init__(self, config: MotionHeadConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.project = nn.Sequential(
                nn.Conv3d(config.teacher_dim, config.hidden, 3, padding=1),
                nn.SiLU(),
                nn.Conv3d(config.hidden, config.width, 1),
            )
            self.decode = nn.Sequential(
                nn.Conv3d(config.width, config.decoder, 3, padding=1),
                nn.SiLU(),
                nn.Conv3d(config.decoder, 2, 1),
            )
        draw_initial_weights(self, seed)

    def motion(self, teacher_BTPD: Tensor, grid: Grid) -> Tensor:
        """Computes the motion space of a clip, (B, T, P, M).

        Raises:
            ValueError: the tokens do not fill the grid.
        """
        return _tokens(self.project(_volume(teacher_BTPD, grid, self._dtype)))

    def flow(self, motion_BTPM: Tensor, grid: Grid) -> Tensor:
        """Computes the flow from each time step to the next, (B, T-1, P, 2), x then y.

        In units of the token grid: 1 is a move by one token between two time steps of the teacher.

        Args:
            motion_BTPM: what `motion` gave.
            grid: (T, H, W) of the tokens.

        Raises:
            ValueError: the tokens do not fill the grid, or it has one time step.
        """
        if grid[0] < 2:
            raise ValueError(f"flow needs two time steps, the grid is {grid}")
        volume_BMTHW = _volume(motion_BTPM, grid, self._dtype)
        return _tokens(self.decode(volume_BMTHW.diff(dim=2)))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _volume(tokens_BTPD: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    frames, height, width = grid
    if tokens_BTPD.shape[1:3] != (frames, height * width):
        raise ValueError(f"tokens {tuple(tokens_BTPD.shape)} do not fill the grid {grid}")
    volume_BTHWD = tokens_BTPD.to(dtype).reshape(-1, frames, height, width, tokens_BTPD.shape[-1])
    return volume_BTHWD.movedim(-1, 1)


def _tokens(volume_BDTHW: Tensor) -> Tensor:
    return volume_BDTHW.movedim(1, -1).flatten(2, 3)
