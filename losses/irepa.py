"""iREPA (arXiv 2512.10794): REPA that transfers the spatial structure of the teacher.

A 3x3 convolution projects the student, and each channel of the teacher is z-scored over a frame's
tokens, which takes away what all tokens share.
Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width.
"""

from typing import ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alignlab.losses.grids import Grid
from alignlab.losses.objective import Features, ObjectiveConfig, Tokens
from alignlab.losses.projector import (
    REPA_HIDDEN,
    irepa_projector,
    project,
    project_frames,
    repa_projector,
)
from alignlab.losses.repa import PairwiseAlignment, PairwiseConfig, repa_loss, spatial_zscore
from alignlab.losses.search_space import NumberRange, SearchRange

GAMMA = 0.6  # share of the spatial mean that is taken away (released code)


def irepa_loss(student_BTPD: Tensor, teacher_BTPD: Tensor, *, gamma: float = GAMMA) -> Tensor:
    """Computes minus the mean cosine with the teacher z-scored frame by frame, (B,), in [-1, 1].

    No gradient reaches the teacher.

    Args:
        student_BTPD: student tokens, already projected to the teacher's width.
        teacher_BTPD: teacher tokens at the same places, not yet z-scored.
        gamma: share of the spatial mean that is taken away; see `spatial_zscore`.

    Raises:
        ValueError: the two shapes differ, or a frame has fewer than two tokens.
    """
    zscored_BTPD = zscored_frames(teacher_BTPD, gamma)
    return repa_loss(student_BTPD.flatten(1, 2), zscored_BTPD.flatten(1, 2))


def zscored_frames(teacher_BTPD: Tensor, gamma: float) -> Tensor:
    """Z-scores each channel over the tokens of one frame; see `spatial_zscore`."""
    return spatial_zscore(teacher_BTPD.flatten(0, 1), gamma).view(teacher_BTPD.shape)


class IRepaConfig(PairwiseConfig):
    """Settings of iREPA.

    Args:
        blocks: (7,), the paper's depth 8; the paper takes depth 4 for its base size. Several
            blocks are averaged.
        weight: 1.0 (code).
        teacher: one alias, or several, which are averaged, as in REPA.
        gamma: 0.6 (code); 0.6 to 0.8 in the paper.
        projector: "conv", the paper's 3x3 convolution, or "mlp", REPA's three linear layers: the
            z-score alone, one of the paper's two parts.
        projector_dim: hidden width of the mlp; left out, REPA's 2048. Not with "conv".
        spatial_norm: whether the teacher is z-scored; if not, the convolution alone. Without
            either part the objective is REPA, and refused.
    """

    name: Literal["irepa"] = "irepa"
    blocks: tuple[int, ...] = (7,)
    gamma: float = Field(default=GAMMA, ge=0.0, le=1.0)
    projector: Literal["conv", "mlp"] = "conv"
    projector_dim: int | None = Field(default=None, ge=1)
    spatial_norm: bool = True

    @model_validator(mode="after")
    def _each_setting_is_read(self) -> Self:
        if self.projector == "mlp" and not self.spatial_norm:
            raise ValueError("projector: mlp without spatial_norm is REPA; set name: repa")
        if self.projector == "conv" and self.projector_dim is not None:
            raise ValueError("projector_dim: nothing reads it with projector: conv; remove it")
        if not self.spatial_norm and self.gamma != GAMMA:
            raise ValueError("gamma: nothing reads it without spatial_norm; remove it")
        return self

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And how much of the mean is taken away, where anything is."""
        space = super().search_space
        return space | {"gamma": NumberRange(0.2, 1.0)} if self.spatial_norm else space


@final
class IRepa(PairwiseAlignment):
    """Minus the cosine of convolved video tokens with a spatially z-scored teacher.

    A setting leaves either of the two parts out. One projector for each pair of block and teacher.
    """

    Config: ClassVar[type[ObjectiveConfig]] = IRepaConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2512.10794"
    config: IRepaConfig

    def _projector(
        self, student_dim: int, teacher_dim: int, generator: torch.Generator
    ) -> nn.Module:
        if self.config.projector == "mlp":
            hidden = self.config.projector_dim or REPA_HIDDEN
            return repa_projector(student_dim, teacher_dim, hidden, generator)
        return irepa_projector(student_dim, teacher_dim, generator)

    def _project(self, projector: nn.Module, tapped: Tokens) -> Tensor:
        if self.config.projector == "mlp":
            return project(projector, tapped.tokens_BND)
        return project_frames(projector, tapped.tokens_BND, tapped.grid)

    def _target(self, features: Features, grid: Grid) -> Tensor:
        target_BTPD = super()._target(features, grid)
        if not self.config.spatial_norm:
            return target_BTPD
        return zscored_frames(target_BTPD, self.config.gamma)
