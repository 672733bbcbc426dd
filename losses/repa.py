"""REPA (arXiv 2410.06940): video tokens point where a frozen vision model's tokens point.

With iREPA's spatial z-score of the teacher (arXiv 2512.10794), which `irepa` builds on.
Shape letters: B batch, T frames, P tokens per frame, N tokens, D width.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from alignlab.kernels.cosine import accumulation_dtype, paired_cosine
from alignlab.losses.grids import student_on, teacher_on
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Grid,
    Objective,
    ObjectiveConfig,
    Terms,
    Tokens,
)
from alignlab.losses.projector import REPA_HIDDEN, project, repa_projector
from alignlab.losses.token_cosine import TokenCosineSettings, logged_cosines
from alignlab.losses.weight import Weight

ZSCORE_EPS = 1e-6


def repa_loss(student_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """Computes minus the mean cosine of matching tokens, (B,), in [-1, 1].

    Computed in float32 (float64 from float64) whatever the input dtype. No gradient reaches the
    teacher.

    Args:
        student_BND: student tokens, already projected to the teacher's width.
        teacher_BND: teacher tokens at the same places.

    Raises:
        ValueError: the two shapes differ.
    """
    if student_BND.shape != teacher_BND.shape:
        raise ValueError(
            f"student {tuple(student_BND.shape)} and teacher {tuple(teacher_BND.shape)} differ"
        )
    return -paired_cosine(student_BND, teacher_BND.detach()).mean(-1)


def spatial_zscore(teacher_BND: Tensor, gamma: float = 0.6) -> Tensor:
    """Computes iREPA's `(y - gamma * mean_n y) / (std_n y + 1e-6)`, per sample and channel.

    Mean and unbiased standard deviation run over the tokens of one image: flatten the frames of a
    video into B first. `gamma` is 0.6 in the released code, 0.6 to 0.8 in the paper.

    Returns:
        (B, N, D) in float32 (float64 from float64).

    Raises:
        ValueError: there are fewer than two tokens, so there is no deviation.
    """
    if teacher_BND.shape[1] < 2:
        raise ValueError(f"spatial_zscore needs at least 2 tokens, got {teacher_BND.shape[1]}")
    teacher_BND = teacher_BND.to(accumulation_dtype(teacher_BND))
    std_B1D, mean_B1D = torch.std_mean(teacher_BND, dim=1, keepdim=True)
    return (teacher_BND - gamma * mean_B1D) / (std_B1D + ZSCORE_EPS)


class PairwiseConfig(TokenCosineSettings, ObjectiveConfig):
    """Settings of objectives that compare pairs of block and teacher."""


class RepaConfig(PairwiseConfig):
    """Settings of REPA.

    Args:
        blocks: (7,), the paper's depth 8; several blocks are averaged.
        weight: 0.5 (paper and code).
        teacher: one alias, or several, which are averaged (code).
        projector_dim: hidden width of the projectors, 2048 (code).
    """

    name: Literal["repa"] = "repa"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (7,)
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)


def cosine_terms(losses_B: Sequence[Tensor], logged_2B: Sequence[Tensor], blocks: int) -> Terms:
    """Averages the negative mean cosines of several blocks, or of pairs of block and teacher.

    Args:
        losses_B: of each pair, the pairs of one block side by side; as many for every block.
        logged_2B: `logged_cosines` of each pair.
        blocks: how many blocks there are.
    """
    loss_B = torch.stack(list(losses_B)).mean(0)
    plain_PB, centered_PB = torch.stack(list(logged_2B), 1)
    return Terms(
        loss_B,
        {"align": loss_B.detach()},
        plain_PB.mean(0),
        similarity_LB=plain_PB.unflatten(0, (blocks, -1)).mean(1),
        centered_B=centered_PB.mean(0),
        watched_B=-loss_B.detach(),
    )


class PairwiseAlignment(Objective):
    """What REPA and iREPA share: `repa_loss` of each pair of block and teacher, averaged over all.

    A subclass gives each pair its projector, and may change what the student is compared with.
    """

    config: PairwiseConfig

    def __init__(
        self,
        config: PairwiseConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ModuleDict(
            {
                _pair(block, number): self._projector(student_dim, teacher_dims[alias], generator)
                for block in config.blocks
                for number, alias in enumerate(config.teachers)
            }
        )

    @abstractmethod
    def _projector(
        self, student_dim: int, teacher_dim: int, generator: torch.Generator
    ) -> nn.Module:
        """Builds the projector of one pair."""

    @abstractmethod
    def _project(self, projector: nn.Module, tapped: Tokens) -> Tensor:
        """Maps the student's tokens to the width of a teacher, (B, N, D)."""

    def _target(self, features: Features, grid: Grid) -> Tensor:
        """What the student is compared with, on its grid, (B, T, P, D): once for all blocks."""
        return teacher_on("student", features.tokens_BTPD, features.grid, grid)

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        blocks, teachers = self.config.blocks, [teacher[alias] for alias in self.config.teachers]
        grid = student[blocks[0]].grid  # the same in every block
        targets = [self._target(features, grid) for features in teachers]
        compared, losses, logged = self.config.compared, [], []
        for block in blocks:
            for number, (features, target_BTPD) in enumerate(zip(teachers, targets, strict=True)):
                projected_BND = self._project(self.projectors[_pair(block, number)], student[block])
                student_BTPD = student_on("student", projected_BND, grid, features.grid)
                sides = compared(student_BTPD), compared(target_BTPD)
                losses.append(repa_loss(*(side.flatten(1, 2) for side in sides)))
                logged.append(logged_cosines(student_BTPD, target_BTPD))
        return cosine_terms(losses, logged, len(blocks))


def _pair(block: int, number: int) -> str:
    """Names a projector. Teachers are numbered, since an alias need not be a module's name."""
    return f"block_{block}_teacher_{number}"


@final
class Repa(PairwiseAlignment):
    """Minus the cosine of video tokens with the teacher's tokens at the same places.

    One projector for each pair of block and teacher, averaged over all.
    """

    Config: ClassVar[type[ObjectiveConfig]] = RepaConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2410.06940"
    config: RepaConfig

    def _projector(
        self, student_dim: int, teacher_dim: int, generator: torch.Generator
    ) -> nn.Module:
        return repa_projector(student_dim, teacher_dim, self.config.projector_dim, generator)

    def _project(self, projector: nn.Module, tapped: Tokens) -> Tensor:
        return project(projector, tapped.tokens_BND)
