"""HASTE's attention term (arXiv 2505.16792): a token attends to the tokens of its frame as it does
in a vision model.

Shape letters: B batch, T frames, G teacher frames of each of them, P tokens per frame, D width of
queries and keys of all heads, H heads, E channels of a head, M maps, L layers.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from alignlab.kernels.cosine import accumulation_dtype
from alignlab.losses.attention_config import AttentionConfig
from alignlab.losses.grids import frame_groups
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Objective,
    ObjectiveConfig,
    Terms,
    Tokens,
)
from alignlab.losses.weight import Weight

HEADS = 12
MAP_NUMBERS = 2**24
"""Of the maps that are in memory at once: 64 MiB in float32, of each of a handful of tensors."""


def attention_cross_entropy(student_BHPP: Tensor, teacher_BHPP: Tensor) -> Tensor:
    """Computes the cross-entropy between attention maps, (B,).

    `-sum_j softmax(teacher)_ij log softmax(student)_ij`, the mean over rows i and heads. Computed
    in float32 (float64 from float64) whatever the input dtype. No gradient reaches the teacher.

    Args:
        student_BHPP: logits: what the softmax over the last dimension is taken of.
        teacher_BHPP: likewise.

    Raises:
        ValueError: the shapes differ.
    """
    if student_BHPP.shape != teacher_BHPP.shape:
        raise ValueError(
            f"student {tuple(student_BHPP.shape)} and teacher {tuple(teacher_BHPP.shape)} differ"
        )
    dtype = accumulation_dtype(student_BHPP, teacher_BHPP)
    target = teacher_BHPP.detach().to(dtype).softmax(-1)
    return _cross_entropy(student_BHPP.to(dtype), target).mean(1)


def attention_alignment_loss(
    student_BTPD: Tensor,
    teacher_BTGPD: Tensor,
    *,
    student_heads: int,
    teacher_heads: int,
    heads: int = HEADS,
) -> Tensor:
    """Computes `attention_cross_entropy` of the maps that queries and keys make, (B,).

    Of each frame by itself: a row of a map says how a token attends to the tokens of its frame, the
    softmax of products of its query with their keys over the square root of E. What else the token
    attends to is in no row: rows of the part of a larger map, made to sum to 1. The target is the
    mean of the maps of the G teacher frames. The first heads of the student are compared with the
    first ones of the teacher, one by one.

    Computed in float32 (float64 from float64) whatever the input dtype, also under autocast. Memory
    is linear in frames and heads, and apart from `MAP_NUMBERS` in tokens: maps are made a few at a
    time, and again in the backward pass. No gradient reaches the teacher.

    Args:
        student_BTPD: queries of all heads, then keys of all heads.
        teacher_BTGPD: likewise; D may be another.
        student_heads: how many D holds.
        teacher_heads: likewise, of the teacher.
        heads: how many are compared at most, 12 (code).

    Raises:
        ValueError: batch, frames or tokens differ.
    """
    return _losses(student_BTPD, teacher_BTGPD, student_heads, teacher_heads, heads)[0].mean(1)


def _losses(
    student_BTPD: Tensor, teacher_BTGPD: Tensor, student_heads: int, teacher_heads: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each frame, and the entropy of its target, which is the least: (B, T)."""
    batch, frames, tokens = student_BTPD.shape[:3]
    if (*teacher_BTGPD.shape[:2], teacher_BTGPD.shape[3]) != (batch, frames, tokens):
        raise ValueError(
            f"student {tuple(student_BTPD.shape)} and teacher {tuple(teacher_BTGPD.shape)} differ "
            "in batch, frames or tokens"
        )
    taken = min(student_heads, teacher_heads, heads)
    query_MPE, key_MPE = (x[:, 0] for x in _by_map(student_BTPD[:, :, None], student_heads, taken))
    teacher = _by_map(teacher_BTGPD.detach(), teacher_heads, taken)
    at_once = max(1, MAP_NUMBERS // tokens**2)
    compare = _map_losses
    if len(query_MPE) > at_once:
        compare = partial(checkpoint, _map_losses, use_reentrant=False, preserve_rng_state=False)
    parts = [
        compare(*(x[start : start + at_once] for x in (query_MPE, key_MPE, *teacher)))
        for start in range(0, len(query_MPE), at_once)
    ]
    loss_BT, entropy_BT = (
        torch.cat(maps).unflatten(0, (batch, frames, taken)).mean(2)
        for maps in zip(*parts, strict=True)
    )
    return loss_BT, entropy_BT


def _by_map(tokens_BTGPD: Tensor, heads: int, taken: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of the first heads, (M, G, P, E): M counts samples, frames and heads."""
    split = tokens_BTGPD.unflatten(-1, (2, heads, -1))[..., :taken, :]
    query, key = split.permute(4, 0, 1, 5, 2, 3, 6).flatten(1, 3)
    return query, key


def _map_losses(
    query_MPE: Tensor, key_MPE: Tensor, teacher_query_MGPE: Tensor, teacher_key_MGPE: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each map with the mean of G, and the entropy of that mean, (M,) each."""
    dtype = accumulation_dtype(query_MPE, teacher_query_MGPE)
    with torch.autocast(query_MPE.device.type, enabled=False):  # products would be bfloat16
        pairs = zip(teacher_query_MGPE.unbind(1), teacher_key_MGPE.unbind(1), strict=True)
        # one after the other, so that G of them are never in memory
        target_MPP = torch.zeros((), dtype=dtype, device=query_MPE.device)
        for query, key in pairs:
            target_MPP = target_MPP + _logits(query, key, dtype).softmax(-1)
        target_MPP = target_MPP / teacher_query_MGPE.shape[1]
        loss_M = _cross_entropy(_logits(query_MPE, key_MPE, dtype), target_MPP)
    return loss_M, -torch.xlogy(target_MPP, target_MPP).sum(-1).mean(-1)


def _logits(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    logits: Tensor = (query.to(dtype) / query.shape[-1] ** 0.5) @ key.to(dtype).mT
    return logits


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the rows of each map."""
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean(-1)


class HasteAttentionConfig(AttentionConfig):
    """Settings of HASTE's attention term.

    Args:
        blocks: (4, 5, 6, 7) (code), in the order of the teacher's layers; the mean over pairs. One
            block goes with every layer, and one layer with every block.
        weight: 0.5 (paper and code).
        teacher: one alias or several, whose feature is `attention:k` or `attention:k-m`; the
            paper's is `attention:8-11` of DINOv2-B.
        heads: how many heads are compared at most, the first of each side, 12 (code). Fewer where
            one side has fewer.
    """

    name: Literal["haste_attention"] = "haste_attention"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (4, 5, 6, 7)
    heads: int = Field(default=HEADS, ge=1)


@final
class HasteAttention(Objective):
    """Attention of each video token to those of its frame, as in the teacher's layers.

    It has no projector: a map has no width.
    """

    Config: ClassVar[type[ObjectiveConfig]] = HasteAttentionConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2505.16792"
    config: HasteAttentionConfig

    def __init__(
        self,
        config: HasteAttentionConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        grid = student[self.config.blocks[0]].grid  # the same in every block
        layers: list[tuple[list[Tensor], int]] = []  # frames that belong together, and heads
        for features in (teacher[alias] for alias in self.config.teachers):
            groups = frame_groups(features.tokens_BTPD, features.grid, grid)
            for number, heads in enumerate(features.heads):
                layer = [x.chunk(len(features.heads), -1)[number] for x in groups]
                layers.append((layer, heads))
        losses, entropies = [], []
        for block, number in self.config.pairs(len(layers)):
            loss_BT, entropy_BT = self._compared(student[block], *layers[number])
            losses.append(loss_BT.mean(1))
            entropies.append(entropy_BT.mean(1))
        loss_B, entropy_B = (torch.stack(x).mean(0) for x in (losses, entropies))
        parts = {"cross_entropy": loss_B.detach(), "kl": (loss_B - entropy_B).detach()}
        return Terms(loss_B, parts)

    def _compared(
        self, tokens: Tokens, groups: list[Tensor], teacher_heads: int
    ) -> tuple[Tensor, Tensor]:
        """Loss and entropy of each frame of a block that the teacher saw, (B, T)."""
        if tokens.heads is None:
            raise ValueError("haste_attention reads queries and keys, and got hidden tokens")
        counts = [x.shape[1] for x in groups]
        frames_BTPD = tokens.tokens_BND.unflatten(1, (tokens.grid[0], -1))[:, -sum(counts) :]
        parts = [
            _losses(own, group, tokens.heads, teacher_heads, self.config.heads)
            for own, group in zip(frames_BTPD.split(counts, 1), groups, strict=True)
        ]
        loss_BT, entropy_BT = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        return loss_BT, entropy_BT
