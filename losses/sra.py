"""SRA (arXiv 2505.02831): shallow blocks imitate deeper ones of the student's own moving average,
which sees a cleaner input.

Shape letters: B batch, N tokens, D width.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.kernels.cosine import accumulation_dtype, paired_cosine
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Objective,
    ObjectiveConfig,
    Reads,
    SelfTeacherConfig,
    Terms,
    Tokens,
    self_key,
)
from alignlab.losses.projector import REPA_HIDDEN, project, repa_projector
from alignlab.losses.search_space import NumberRange, SearchRange
from alignlab.losses.token_cosine import TokenCosineSettings, logged_cosines
from alignlab.losses.weight import Weight

BETA = 0.05
SelfLoss = Literal["cosine", "smooth_l1"]


def self_alignment_loss(
    student_BND: Tensor, teacher_BND: Tensor, *, loss: SelfLoss = "cosine", beta: float = BETA
) -> Tensor:
    """Computes how far tokens are from those of the student's average, (B,).

    Computed in float32 (float64 from float64) whatever the input dtype. No gradient reaches the
    teacher.

    Args:
        student_BND: student tokens, already through their head.
        teacher_BND: the average's tokens at the same places.
        loss: `cosine`: minus the mean cosine over the channels, in [-1, 1]; `smooth_l1`: mean over
            tokens and channels (the paper's code).
        beta: of `smooth_l1`, where it passes from a square to a line, 0.05 (code).

    Raises:
        ValueError: the two shapes differ, or the loss is another.
    """
    if student_BND.shape != teacher_BND.shape:
        raise ValueError(
            f"student {tuple(student_BND.shape)} and teacher {tuple(teacher_BND.shape)} differ"
        )
    teacher_BND = teacher_BND.detach()
    if loss == "cosine":
        return -paired_cosine(student_BND, teacher_BND).mean(-1)
    if loss != "smooth_l1":
        raise ValueError(f"loss {loss!r}: choose cosine, smooth_l1")
    dtype = accumulation_dtype(student_BND, teacher_BND)
    distance_BND = F.smooth_l1_loss(
        student_BND.to(dtype), teacher_BND.to(dtype), beta=beta, reduction="none"
    )
    return distance_BND.mean((1, 2))


class SraConfig(TokenCosineSettings, SelfTeacherConfig):
    """Settings of SRA.

    Args:
        blocks: (7,), the paper's depth 8 of 28; several are averaged.
        weight: 0.5 (code, the smallest it uses; up to 2).
        deep_blocks: (19,), the paper's depth 20 of 28.
        loss: `cosine`, the code's default since 2026-07; before, and in the paper, `smooth_l1`.
        beta: with `smooth_l1`: where it passes from a square to a line; left out, 0.05 (code).
        projector_dim: hidden width of the heads, 2048, as REPA's (ours).
    """

    name: Literal["sra"] = "sra"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (7,)
    deep_blocks: tuple[int, ...] = Field(default=(19,), min_length=1)
    loss: SelfLoss = "cosine"
    beta: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)

    @model_validator(mode="after")
    def _each_setting_is_read(self) -> Self:
        if self.beta is not None and self.loss != "smooth_l1":
            raise ValueError(f"beta: nothing reads it with loss: {self.loss}; remove it")
        for setting in ("centered", "temporal_difference"):
            if self.loss != "cosine" and getattr(self, setting):
                raise ValueError(f"{setting}: is for the cosine, not for loss: {self.loss}; remove")
        return self

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And how much cleaner the average's input is."""
        return super().search_space | {"cleaner": NumberRange(0.0, 0.4)}


class SelfAlignment(Objective):
    """What SRA and Self-Flow share: a head for each pair of blocks, whose losses are averaged."""

    reads: ClassVar[Reads] = "self"
    config: SelfTeacherConfig

    def __init__(
        self,
        config: Any,
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
                f"block_{block}": repa_projector(
                    student_dim, teacher_dims[self_key(deep)], config.projector_dim, generator
                )
                for block, deep in zip(config.blocks, config.deep_blocks, strict=True)
            }
        )

    @abstractmethod
    def _loss(self, student_BTPD: Tensor, target_BTPD: Tensor) -> Tensor:
        """Of projected tokens and those of the average, (B,)."""

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        config = self.config
        losses, logged = [], []
        for block, deep in zip(config.blocks, config.deep_blocks, strict=True):
            head = self.projectors[f"block_{block}"]
            projected_BND = project(head, student[block].tokens_BND)
            student_BTPD = projected_BND.unflatten(1, (student[block].grid[0], -1))
            target_BTPD = teacher[self_key(deep)].tokens_BTPD
            losses.append(self._loss(student_BTPD, target_BTPD))
            logged.append(logged_cosines(student_BTPD, target_BTPD))
        loss_B = torch.stack(losses).mean(0)
        plain_LB, centered_LB = torch.stack(logged, 1)
        return Terms(
            loss_B,
            {"align": loss_B.detach()},
            plain_LB.mean(0),
            similarity_LB=plain_LB,
            centered_B=centered_LB.mean(0),
            watched_B=-loss_B.detach(),
        )


@final
class Sra(SelfAlignment):
    """Video tokens follow a deeper block of the student's own average, which sees less noise.

    One head for each pair of blocks, averaged over all.
    """

    Config: ClassVar[type[ObjectiveConfig]] = SraConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2505.02831"
    config: SraConfig

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        terms = super().forward(student, teacher, context)
        return terms if self.config.loss == "cosine" else replace(terms, watched_B=None)

    def _loss(self, student_BTPD: Tensor, target_BTPD: Tensor) -> Tensor:
        config = self.config
        return self_alignment_loss(
            config.compared(student_BTPD).flatten(1, 2),
            config.compared(target_BTPD).flatten(1, 2),
            loss=config.loss,
            beta=config.beta or BETA,
        )
