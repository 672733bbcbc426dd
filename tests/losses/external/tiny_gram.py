"""An objective of another package without a projector.

The cosines among a sample's own tokens are to be those among the teacher's.

Shape letters: B batch, N tokens, D width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
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


def gram_loss(student_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """Computes the mean squared difference of the two matrices of cosines, (B,)."""
    wide = torch.promote_types(student_BND.dtype, torch.float32)
    student = F.normalize(student_BND.to(wide), dim=-1)
    teacher = F.normalize(teacher_BND.detach().to(wide), dim=-1)
    return (student @ student.mT - teacher @ teacher.mT).square().mean((1, 2))


class GramConfig(ObjectiveConfig):
    """Settings of the Gram loss."""

    name: Literal["gram"] = "gram"
    blocks: tuple[int, ...] = (2,)
    teacher: str


@final
class Gram(Objective):
    """Cosines among tokens, without a projector."""

    Config: ClassVar[type[ObjectiveConfig]] = GramConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"

    def __init__(
        self,
        config: GramConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: GramConfig = config

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
                tapped.tokens_BND, tapped.grid, features.tokens_BTPD, features.grid, "student"
            )
            per_block.append(gram_loss(ours_BTPD.flatten(1, 2), theirs_BTPD.flatten(1, 2)))
        loss_B = torch.stack(per_block).mean(0)
        return Terms(loss_B, {"gram": loss_B.detach()})
