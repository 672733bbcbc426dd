"""CREPA (arXiv 2506.09229): each frame's tokens also follow the teacher of the frames beside it.

Shape letters: B batch, T frames, P tokens per frame, D width.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alignlab.kernels.cosine import accumulation_dtype, unit
from alignlab.losses.grids import student_on, teacher_on
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Objective,
    ObjectiveConfig,
    Terms,
    Tokens,
)
from alignlab.losses.projector import REPA_HIDDEN, linear_projector, project, repa_projector
from alignlab.losses.search_space import SearchRange, tenfold
from alignlab.losses.token_cosine import TokenCosineSettings, logged_cosines
from alignlab.losses.weight import Weight

Reduction = Literal["sum", "mean"]


def cross_frame_loss(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    *,
    distance: int = 1,
    tau: float = 1.0,
    reduction: Reduction = "sum",
) -> Tensor:
    """Computes minus each frame's mean cosine with its own and its neighbours' teacher, (B,).

    A neighbour is `distance` frames before or after and weighs `exp(-distance / tau)`; a frame at
    the border lacks one. Computed in float32 (float64 from float64) whatever the input dtype. No
    gradient reaches the teacher.

    Args:
        student_BTPD: student tokens, already projected to the teacher's width.
        teacher_BTPD: teacher tokens at the same places.
        distance: 1 in the paper.
        tau: 1 in the paper; towards 0 the loss becomes REPA's.
        reduction: "sum" over frames (paper), or "mean" (SimpleTuner's unofficial code).

    Raises:
        ValueError: the two shapes differ, `distance` < 1 or `tau` <= 0.
    """
    own_B, neighbours_B = _similarities(student_BTPD, teacher_BTPD, distance, tau, reduction)
    return -(own_B + neighbours_B)


def _similarities(
    student_BTPD: Tensor, teacher_BTPD: Tensor, distance: int, tau: float, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """Computes the reduced cosines with the same frame and, weighted, with the neighbours."""
    if student_BTPD.shape != teacher_BTPD.shape:
        raise ValueError(
            f"student {tuple(student_BTPD.shape)} and teacher {tuple(teacher_BTPD.shape)} differ"
        )
    if distance < 1 or not tau > 0:
        raise ValueError(f"distance ({distance}) must be at least 1 and tau ({tau}) above 0")
    dtype = accumulation_dtype(student_BTPD, teacher_BTPD)
    student, teacher = unit(student_BTPD, dtype), unit(teacher_BTPD.detach(), dtype)
    own_BT = (student * teacher).sum(-1).mean(-1)
    before_BT = (student[:, distance:] * teacher[:, :-distance]).sum(-1).mean(-1)
    after_BT = (student[:, :-distance] * teacher[:, distance:]).sum(-1).mean(-1)
    neighbours_B = math.exp(-distance / tau) * (before_BT.sum(1) + after_BT.sum(1))
    frames = own_BT.shape[1] if reduction == "mean" else 1
    return own_BT.sum(1) / frames, neighbours_B / frames


class CrepaConfig(TokenCosineSettings, ObjectiveConfig):
    """Settings of CREPA.

    Args:
        blocks: (7,), the paper's block 8 of CogVideoX-5B; it takes block 10 of HunyuanVideo.
            Several blocks are averaged.
        weight: 0.5 (paper, CogVideoX-5B); 1.0 for HunyuanVideo.
        distance: 1 (paper).
        tau: 1.0 (paper).
        reduction: "sum" over frames (paper), so the loss grows with the length of the clip.
        projector: not published. "mlp" is REPA's, from which the paper starts; "linear" is a
            LayerNorm and one linear layer (SimpleTuner's unofficial code).
        projector_dim: hidden width of the mlp; left out, REPA's 2048. Not with "linear".
    """

    name: Literal["crepa"] = "crepa"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (7,)
    teacher: str
    distance: int = Field(default=1, ge=1)
    tau: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    reduction: Reduction = "sum"
    projector: Literal["mlp", "linear"] = "mlp"
    projector_dim: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _projector_dim_is_read(self) -> Self:
        if self.projector == "linear" and self.projector_dim is not None:
            raise ValueError("projector_dim: nothing reads it with projector: linear; remove it")
        return self

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And the decay over frames."""
        return super().search_space | {"tau": tenfold(1.0)}


@final
class Crepa(Objective):
    """Minus the cosine of each frame's tokens with the teacher of its own and adjacent frames.

    One projector per block.
    """

    Config: ClassVar[type[ObjectiveConfig]] = CrepaConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2506.09229"

    def __init__(
        self,
        config: CrepaConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: CrepaConfig = config
        generator = torch.Generator().manual_seed(seed)
        teacher_dim, hidden = teacher_dims[config.teacher], config.projector_dim or REPA_HIDDEN
        self.projectors = nn.ModuleDict(
            {
                f"block_{block}": repa_projector(student_dim, teacher_dim, hidden, generator)
                if config.projector == "mlp"
                else linear_projector(student_dim, teacher_dim, generator)
                for block in config.blocks
            }
        )

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        config, features = self.config, teacher[self.config.teacher]
        grid = student[config.blocks[0]].grid  # the same in every block
        teacher_BTPD = teacher_on("student", features.tokens_BTPD, features.grid, grid)
        target_BTPD = config.compared(teacher_BTPD)
        per_block, logged = [], []
        for block in config.blocks:
            projected_BND = project(self.projectors[f"block_{block}"], student[block].tokens_BND)
            student_BTPD = student_on("student", projected_BND, grid, features.grid)
            own_B, neighbours_B = _similarities(
                config.compared(student_BTPD),
                target_BTPD,
                config.distance,
                config.tau,
                config.reduction,
            )
            frames = target_BTPD.shape[1] if config.reduction == "sum" else 1
            per_block.append(torch.stack([own_B, neighbours_B, own_B / frames]))
            logged.append(logged_cosines(student_BTPD, teacher_BTPD))
        own_B, neighbours_B, cosine_B = torch.stack(per_block).mean(0)
        plain_LB, centered_LB = torch.stack(logged, 1)
        if not (config.centered or config.temporal_difference):
            plain_LB = torch.stack(per_block)[:, 2].detach()  # to the bit what plateaus watch
        return Terms(
            -(own_B + neighbours_B),
            {"own": -own_B.detach(), "neighbours": -neighbours_B.detach()},
            plain_LB.mean(0),
            similarity_LB=plain_LB,
            centered_B=centered_LB.mean(0),
            watched_B=cosine_B.detach(),
        )
