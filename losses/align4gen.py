"""Align4Gen (arXiv 2509.09547): video tokens follow several frozen vision models fused into one.

Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from alignlab.kernels.cosine import accumulation_dtype, unit
from alignlab.losses.grids import match_grids
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Objective,
    ObjectiveConfig,
    Terms,
    Tokens,
)
from alignlab.losses.projector import REPA_HIDDEN, project, repa_projector
from alignlab.losses.repa import cosine_terms, repa_loss
from alignlab.losses.token_cosine import TokenCosineSettings, centered
from alignlab.losses.weight import Weight

Normalization = Literal["joint", "per_teacher"]


def fuse_features(features_BND: Sequence[Tensor]) -> Tensor:
    """Normalises each teacher's tokens and joins them along the channels, as unit vectors.

    Args:
        features_BND: each (B, N, D) with its own D, at the same places.

    Returns:
        (B, N, sum of D) in float32 (float64 if one is), divided by the root of the number of
        teachers.

    Raises:
        ValueError: there are none, or they differ in B or N.
    """
    places = {tuple(x.shape[:-1]) for x in features_BND}
    if len(places) != 1:
        raise ValueError(f"teachers to fuse must share batch and tokens, got {sorted(places)}")
    dtype = accumulation_dtype(*features_BND)
    return torch.cat([unit(x, dtype) for x in features_BND], -1) / math.sqrt(len(features_BND))


def fused_alignment_loss(
    student_BND: Tensor,
    features_BND: Sequence[Tensor],
    *,
    normalization: Normalization = "joint",
) -> Tensor:
    """Computes minus the mean cosine with several teachers at once, (B,), in [-1, 1].

    No gradient reaches the teachers.

    Args:
        student_BND: student tokens, already projected to the summed width of the teachers.
        features_BND: tokens of each teacher at the same places.
        normalization: "joint" compares the whole student vector with `fuse_features`, so that
            the student may trade one teacher for another; "per_teacher" normalises the student's
            channels of each teacher by themselves, which gives the mean of their cosines.

    Raises:
        ValueError: the shapes do not fit.
    """
    widths = [x.shape[-1] for x in features_BND]
    if sum(widths) != student_BND.shape[-1]:
        raise ValueError(f"student width {student_BND.shape[-1]} is not the sum of {widths}")
    if normalization == "joint":
        return repa_loss(student_BND, fuse_features(features_BND))
    shares = student_BND.split(widths, dim=-1)
    losses = [repa_loss(s, f) for s, f in zip(shares, features_BND, strict=True)]
    return torch.stack(losses).mean(0)


class Align4GenConfig(TokenCosineSettings, ObjectiveConfig):
    """Settings of Align4Gen; the paper's own values could not be found, these are alignlab's.

    Args:
        blocks: (7,), REPA's depth 8; several blocks are averaged.
        weight: 0.5, REPA's.
        teacher: one alias or several; the paper fuses DINOv2 and SAM 2.1 Hiera.
        normalization: "joint" is the paper's concatenation; see `fused_alignment_loss`.
        projector_dim: hidden width of the projectors, 2048, REPA's.
    """

    name: Literal["align4gen"] = "align4gen"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (7,)
    normalization: Normalization = "joint"
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)


@final
class Align4Gen(Objective):
    """Minus the cosine of video tokens with the joined features of several teachers.

    One projector per block, to the summed width of the teachers.
    """

    Config: ClassVar[type[ObjectiveConfig]] = Align4GenConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2509.09547"

    def __init__(
        self,
        config: Align4GenConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: Align4GenConfig = config
        generator = torch.Generator().manual_seed(seed)
        width = sum(teacher_dims[alias] for alias in config.teachers)
        self.projectors = nn.ModuleDict(
            {
                f"block_{block}": repa_projector(
                    student_dim, width, config.projector_dim, generator
                )
                for block in config.blocks
            }
        )

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        config, teachers = self.config, [teacher[alias] for alias in self.config.teachers]
        grid = student[self.config.blocks[0]].grid  # the same in every block
        matched = match_grids([(x.tokens_BTPD, x.grid) for x in teachers], grid)
        frames = matched[0].shape[1]
        features_BND = [config.compared(x).flatten(1, 2) for x in matched]
        losses, logged = [], []
        for block in config.blocks:
            projected_BND = project(self.projectors[f"block_{block}"], student[block].tokens_BND)
            student_BTPD = projected_BND.unflatten(1, (grid[0], -1))[:, -frames:]
            losses.append(
                fused_alignment_loss(
                    config.compared(student_BTPD).flatten(1, 2),
                    features_BND,
                    normalization=config.normalization,
                )
            )
            logged.append(self._logged(student_BTPD.flatten(1, 2), matched))
        return cosine_terms(losses, logged, len(losses))

    @torch.no_grad()
    def _logged(self, student_BND: Tensor, matched_BTPD: Sequence[Tensor]) -> Tensor:
        """As `logged_cosines`, with the teachers fused; each of them is centred by itself."""
        features_BND = [x.flatten(1, 2) for x in matched_BTPD]
        sides = (student_BND, features_BND), (centered(student_BND), [*map(centered, features_BND)])
        how = self.config.normalization
        return torch.stack([-fused_alignment_loss(*side, normalization=how) for side in sides])
