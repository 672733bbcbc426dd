"""Objectives of another package that read no teacher: the clean latents, or nothing but tokens.

Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.losses.objective import (
    LATENTS,
    NO_CONTEXT,
    Context,
    Features,
    NoTeacherConfig,
    Objective,
    ObjectiveConfig,
    Reads,
    Terms,
    Tokens,
)
from alignlab.losses.projector import linear_projector, project


def latent_error(student_BND: Tensor, latents_BND: Tensor) -> Tensor:
    """Computes the mean squared error, (B,)."""
    wide = torch.promote_types(student_BND.dtype, torch.float32)
    return (student_BND.to(wide) - latents_BND.detach().to(wide)).square().mean((1, 2))


class LatentErrorConfig(NoTeacherConfig):
    """Settings of the error to the clean latents."""

    name: Literal["latent_error"] = "latent_error"
    blocks: tuple[int, ...] = (1,)


@final
class LatentError(Objective):
    """Squared error of projected tokens to the clean latents."""

    Config: ClassVar[type[ObjectiveConfig]] = LatentErrorConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    reads: ClassVar[Reads] = "latents"

    def __init__(
        self,
        config: LatentErrorConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: LatentErrorConfig = config
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ModuleDict(
            {
                str(block): linear_projector(student_dim, teacher_dims[LATENTS], generator)
                for block in config.blocks
            }
        )

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        latents_BND = teacher[LATENTS].tokens_BTPD.flatten(1, 2)
        per_block = [
            latent_error(
                project(self.projectors[str(block)], student[block].tokens_BND), latents_BND
            )
            for block in self.config.blocks
        ]
        loss_B = torch.stack(per_block).mean(0)
        return Terms(loss_B, {"error": loss_B.detach()})


def spread_loss(student_BND: Tensor) -> Tensor:
    """Computes the mean cosine of a sample's tokens with each other, (B,)."""
    wide = torch.promote_types(student_BND.dtype, torch.float32)
    return F.normalize(student_BND.to(wide), dim=-1).mean(1).square().sum(-1)


class SpreadConfig(NoTeacherConfig):
    """Settings of the spread; what it aligns may be any block, `far` is measured beside it.

    Args:
        far: a block whose spread is added.
    """

    name: Literal["spread"] = "spread"
    blocks: tuple[int, ...] = (1,)
    far: int = 2

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        return {"blocks": self.blocks, "far": (self.far,)}


@final
class Spread(Objective):
    """Tokens of a sample point in different directions."""

    Config: ClassVar[type[ObjectiveConfig]] = SpreadConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    reads: ClassVar[Reads] = "nothing"

    def __init__(
        self,
        config: SpreadConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: SpreadConfig = config

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        tapped = (*self.config.blocks, self.config.far)
        loss_B = torch.stack([spread_loss(student[b].tokens_BND) for b in tapped]).mean(0)
        return Terms(loss_B, {"spread": loss_B.detach()})
