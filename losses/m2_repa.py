"""M2-REPA (arXiv 2605.01896): a head for each of several frozen vision models, held apart by CKA.

Shape letters: B batch, T frames, N tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alignlab.kernels.cosine import NORM_EPS, accumulation_dtype
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
from alignlab.losses.search_space import NumberRange, SearchRange
from alignlab.losses.token_cosine import TokenCosineSettings, logged_cosines
from alignlab.losses.weight import Weight

DECOUPLE = 0.05
CKA_EPS = 1e-12  # a product of two squared norms is 1 / (D E) or more, unless a head is constant


def decoupled_alignment_loss(
    heads: Sequence[Tensor], teachers: Sequence[Tensor], *, decouple: float = DECOUPLE
) -> Tensor:
    """Computes minus the mean cosine of each head with its teacher, plus how alike heads are, (B,).

    `mean_k -cos(head_k, teacher_k) + decouple * mean_{k<l} CKA(head_k, head_l)`, with `heads_cka`.
    Of one head there is no pair, and the second term is 0. Computed in float32 (float64 from
    float64) whatever the input dtype, also under autocast. No gradient reaches the teachers.

    Args:
        heads: student tokens as each head gives them, (B, N, D) with the D of its teacher.
        teachers: tokens of each teacher at the same places, in the order of the heads.
        decouple: factor on the CKA, 0.05.

    Raises:
        ValueError: there are none, or shapes differ: of a head and its teacher, or of two heads in
            B or N.
    """
    return _aligned(heads, teachers) + decouple * heads_cka(heads)


def heads_cka(heads: Sequence[Tensor]) -> Tensor:
    """Computes the linear CKA of each pair of heads, and their mean, (B,), in [0, 1].

    For each sample by itself, over its tokens: with X and Y two heads' tokens (N, D) and (N, E)
    minus their mean over the N tokens, `|X^T Y|^2 / (|X^T X| |Y^T Y|)` in Frobenius norms. 1: one
    is a rotation and scaling of the other; 0: no direction of the one varies with any of the other,
    or all tokens of a head are equal. Memory is linear in tokens. The mean over pairs is that of
    0 for one head. Computed in float32 (float64 from float64), also under autocast.

    Args:
        heads: (B, N, D) each with its own D, at the same places.

    Raises:
        ValueError: there are none, or they differ in B or N.
    """
    places = {tuple(x.shape[:-1]) for x in heads}
    if len(places) != 1:
        raise ValueError(f"heads must share batch and tokens, got {sorted(places)}")
    dtype = accumulation_dtype(*heads)
    centred = [_centred(x.to(dtype)) for x in heads]
    with torch.autocast(heads[0].device.type, enabled=False):  # products would be bfloat16
        own = [_squared_norm(x, x) for x in centred]
        pairs = [
            _squared_norm(centred[k], centred[m]) / (own[k] * own[m]).clamp_min(CKA_EPS).sqrt()
            for k, m in combinations(range(len(heads)), 2)
        ]
    if not pairs:
        return torch.zeros_like(own[0])
    return torch.stack(pairs).mean(0)


def _centred(head_BND: Tensor) -> Tensor:
    """Minus the mean over tokens, over the norm, which is a constant: CKA does not see it."""
    centred_BND: Tensor = head_BND - head_BND.mean(1, keepdim=True)
    norm_B11: Tensor = torch.linalg.vector_norm(centred_BND.detach(), dim=(1, 2), keepdim=True)
    unit_BND: Tensor = centred_BND / norm_B11.clamp_min(NORM_EPS)
    return unit_BND


def _squared_norm(left_BND: Tensor, right_BNE: Tensor) -> Tensor:
    """Squared Frobenius norm of the products along tokens, (B,)."""
    products_BDE: Tensor = left_BND.mT @ right_BNE
    return products_BDE.square().sum((1, 2))


def _aligned(heads: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Minus the mean cosine of each head with its teacher, (B,)."""
    if not heads or len(heads) != len(teachers):
        raise ValueError(f"{len(heads)} heads and {len(teachers)} teachers: give one for each")
    losses = [repa_loss(head, teacher) for head, teacher in zip(heads, teachers, strict=True)]
    return torch.stack(losses).mean(0)


class M2RepaConfig(TokenCosineSettings, ObjectiveConfig):
    """Settings of M2-REPA.

    Args:
        blocks: (7,), depth 8 (takenoko, a port by a third party); several are averaged.
        weight: 0.5 (port).
        teacher: two aliases or more; the paper takes DINOv2, Depth Anything V2 and SAM 2.
        decouple: factor on the CKA between heads, 0.1, beside the cosines: `weight` multiplies it
            too, so that it counts 0.05 (port) where the cosines count 0.5.
        projector_dim: hidden width of the heads, 2048 (port).
    """

    name: Literal["m2_repa"] = "m2_repa"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (7,)
    decouple: float = Field(default=DECOUPLE / 0.5, ge=0.0, allow_inf_nan=False)
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)

    @model_validator(mode="after")
    def _heads_have_pairs(self) -> Self:
        if len(self.teachers) < 2:
            raise ValueError(
                f"m2_repa holds the heads of several teachers apart, and teacher names "
                f"{self.teachers[0]} alone: name two or more, or take repa"
            )
        return self

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And how much the heads are held apart."""
        return super().search_space | {"decouple": NumberRange(0.0, 0.4)}


@final
class M2Repa(Objective):
    """Minus the cosine with several teachers, each through a head of its own, held apart by CKA.

    One head for each pair of block and teacher; blocks are averaged.
    """

    Config: ClassVar[type[ObjectiveConfig]] = M2RepaConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2605.01896"
    config: M2RepaConfig

    def __init__(
        self,
        config: M2RepaConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.heads = nn.ModuleDict(
            {
                _head(block, number): repa_projector(
                    student_dim, teacher_dims[alias], config.projector_dim, generator
                )
                for block in config.blocks
                for number, alias in enumerate(config.teachers)
            }
        )

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        config = self.config
        grid = student[config.blocks[0]].grid  # the same in every block
        features = [teacher[alias] for alias in config.teachers]
        matched = match_grids([(x.tokens_BTPD, x.grid) for x in features], grid)
        frames = matched[0].shape[1]
        targets = [config.compared(x).flatten(1, 2) for x in matched]
        losses, alike, logged = [], [], []
        for block in config.blocks:
            heads = [
                project(self.heads[_head(block, number)], student[block].tokens_BND)
                .unflatten(1, (grid[0], -1))[:, -frames:]
                for number in range(len(targets))
            ]  # fmt: skip
            losses.append(_aligned([config.compared(x).flatten(1, 2) for x in heads], targets))
            alike.append(heads_cka([x.flatten(1, 2) for x in heads]))
            logged += [logged_cosines(*pair) for pair in zip(heads, matched, strict=True)]
        terms, alike_B = (
            cosine_terms(losses, logged, len(config.blocks)),
            torch.stack(alike).mean(0),
        )
        parts = terms.parts | {"cka": alike_B.detach()}
        return replace(terms, loss_B=terms.loss_B + config.decouple * alike_B, parts=parts)


def _head(block: int, number: int) -> str:
    """Names a head. Teachers are numbered, since an alias need not be a module's name."""
    return f"block_{block}_teacher_{number}"
