"""An objective of another package: squared distance of unit vectors, one linear projector.

It may read a Stage 1 network of the same package, which scales the teacher's channels.
Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field
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
from alignlab.losses.stage1.folder import Stage1Row, load_for_teacher


def unit_distance(student_BND: Tensor, teacher_BND: Tensor, *, scale: float = 1.0) -> Tensor:
    """Computes the mean squared distance of matching unit vectors times `scale`, (B,)."""
    student = F.normalize(
        student_BND.to(torch.promote_types(student_BND.dtype, torch.float32)), dim=-1
    )
    teacher = F.normalize(teacher_BND.detach().to(student.dtype), dim=-1)
    return scale * (student - teacher).square().sum(-1).mean(-1)


class ChannelGainConfig(BaseModel):
    """Shape of the Stage 1 network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_dim: int = Field(ge=1)


class ChannelGain(nn.Module):
    """A factor for each channel of the teacher."""

    def __init__(self, config: ChannelGainConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.gain_D = nn.Parameter(torch.rand(config.teacher_dim, generator=generator))

    def forward(self, teacher_BTPD: Tensor) -> Tensor:
        return teacher_BTPD.to(self.gain_D.dtype) * self.gain_D


STAGE1 = Stage1Row(ChannelGain, ChannelGainConfig, setting="gain")


class UnitDistanceConfig(ObjectiveConfig):
    """Settings of the unit distance.

    Args:
        scale: factor on the distance.
        gain: folder of a trained `ChannelGain`; None leaves the teacher as it is.
    """

    name: Literal["unit_distance"] = "unit_distance"
    blocks: tuple[int, ...] = (2,)
    teacher: str
    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    gain: str | None = None


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
        self.gain: nn.Module | None = None
        if config.gain is not None:
            self.gain = load_for_teacher(config.gain, config.name, config.teacher, len(weight))

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        features = teacher[self.config.teacher]
        teacher_BTPD = features.tokens_BTPD
        if self.gain is not None:
            teacher_BTPD = self.gain(teacher_BTPD.detach())
        per_block = []
        for block in self.config.blocks:
            tapped = student[block]
            ours_BTPD, theirs_BTPD = common_grid(
                project(self.projector, tapped.tokens_BND),
                tapped.grid,
                teacher_BTPD,
                features.grid,
                "student",
            )
            ours_BND, theirs_BND = ours_BTPD.flatten(1, 2), theirs_BTPD.flatten(1, 2)
            per_block.append(unit_distance(ours_BND, theirs_BND, scale=self.config.scale))
        loss_B = torch.stack(per_block).mean(0)
        return Terms(loss_B, {"distance": loss_B.detach()})
