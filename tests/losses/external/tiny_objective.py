"""An objective of another package: squared distance of unit vectors, one linear projector.

Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.losses.grids import common_grid
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Objective,
    ObjectiveConfig,
    Terms,
    Tokens,
)
from alignlab.losses.projector import project


def unit_distance(student_BND: Tensor, teacher_BND: Tensor, *, scale: float = 1.0) -> Tensor:
    """Computes the mean squared distance of matching unit vectors times `scale`, (B,)."""
    student = F.normalize(
        student_BND.to(torch.promote_types(student_BND.dtype, torch.float32)), dim=-1
    )
    teacher = F.normalize(teacher_BND.detach().to(student.dtype), dim=-1)
    return scale * (student - teacher).square().sum(-1).mean(-1)


class UnitDistanceConfig(ObjectiveConfig):
    """Settings of the unit distance."""

    name: Literal["unit_distance"] = "unit_distance"
    blocks: tuple[int, ...] = (2,)
    teacher: str
    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)


@final
class UnitDistance(Objective):
    """Squared distance of unit vectors."""

    Config: ClassVar[type[ObjectiveConfig]] = UnitDistanceConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"

    def __init__(
        self,
        config: UnitDistanceConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: UnitDistanceConfig = config
        weight = torch.randn(
            teacher_dims[config.teacher], student_dim, generator=torch.Generator().manual_seed(seed)
        )
        self.projector = nn.Linear(student_dim, len(weight), bias=False, device="meta")
        self.projector.weight = nn.Parameter(weight / student_dim**0.5)

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        features = teacher[self.config.teacher]
        per_block = []
        for block in self.config.blocks:
            tapped = student[block]
            ours_BTPD, theirs_BTPD = common_grid(
                project(self.projector, tapped.tokens_BND),
                tapped.grid,
                features.tokens_BTPD,
                features.grid,
                "student",
            )
            ours_BND, theirs_BND = ours_BTPD.flatten(1, 2), theirs_BTPD.flatten(1, 2)
            per_block.append(unit_distance(ours_BND, theirs_BND, scale=self.config.scale))
        loss_B = torch.stack(per_block).mean(0)
        return Terms(loss_B, {"distance": loss_B.detach()})
