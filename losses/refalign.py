"""RefAlign (arXiv 2603.25743): reference tokens follow a frozen vision model, subject by subject.

Shape letters: L blocks, B batch, K subjects, P tokens per reference, N = K*P tokens, D width.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from alignlab.kernels.cosine import paired_cosine
from alignlab.kernels.host_copy import to_device
from alignlab.kernels.pull_push import OPERATION, Impl, pull_push
from alignlab.losses.grids import match_grid
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Need,
    Objective,
    ObjectiveConfig,
    Terms,
    Tokens,
    implementation_of,
)
from alignlab.losses.projector import project, refalign_projector
from alignlab.losses.search_space import DepthRange, NumberRange, SearchRange
from alignlab.losses.token_cosine import centered

Negatives = Literal["sample", "batch"]


def reference_alignment_loss(
    student_BND: Tensor,
    teacher_BND: Tensor,
    subject_ids_BN: Tensor,
    *,
    host_ids_BN: Tensor | None = None,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    neg_weight: float = 1.0,
    negatives: Negatives = "sample",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `total = pull + neg_weight * push` for each sample.

    `pull` is the mean cosine distance between a student token and the teacher token at the same
    place, beyond `pos_margin`; `push` is the mean amount by which a student token is closer than
    `neg_margin` to the teacher tokens of other subjects. Student tokens are already projected to
    the teacher's width. No gradient reaches the teacher.

    Args:
        student_BND: projected student tokens. More dimensions may lead, such as blocks; every index
            of them has a value of its own.
        teacher_BND: teacher tokens at the same places, broadcastable to the student's.
        subject_ids_BN: subject of each token, -1 for padding; broadcastable like the teacher.
        host_ids_BN: the same on the CPU, or None; see `alignlab.kernels.pull_push.pull_push`.
        pos_margin: 0 in the released code.
        neg_margin: 1 in the released code; the paper's value is not known.
        neg_weight: 1 in paper and code; 0 leaves the push out.
        negatives: "sample" pushes from the other subjects of the same sample (code, at its batch
            of 1); "batch" from those of all samples (in a run, of a micro-batch), which ids must
            tell apart: then every sample with a valid token carries the mean over the batch.
        impl: see `pull_push`.

    Returns:
        (total, pull, push), each (B,) after the leading dimensions. A sample without a valid token
        gives 0 and no gradient, a sample with one subject has push 0.

    Raises:
        ValueError: shapes do not fit or `impl` cannot run.
    """
    teacher_BND = teacher_BND.detach()
    margins = {"pos_margin": pos_margin, "neg_margin": neg_margin}
    pull_B, push_B = pull_push(
        student_BND, teacher_BND, subject_ids_BN, host_ids=host_ids_BN, impl=impl, **margins
    )
    if negatives == "batch":
        _, push = pull_push(
            student_BND.flatten(-3, -2),
            teacher_BND.flatten(-3, -2),
            subject_ids_BN.flatten(-2),
            host_ids=None if host_ids_BN is None else host_ids_BN.flatten(-2),
            neg_margin=neg_margin,
            impl=impl,
        )
        push_B = push.unsqueeze(-1) * (subject_ids_BN >= 0).any(-1)
    return pull_B + neg_weight * push_B, pull_B, push_B


class RefAlignConfig(ObjectiveConfig):
    """Settings of RefAlign.

    Args:
        blocks: 0..8, the first nine, for 30 and 40 block models alike (paper and code).
        weight: 1.0 (paper and code).
        gate: none, as in the paper; the released code multiplies by t^3 (see `PowerGate`).
        neg_weight: factor on the push, 1.0 (paper and code).
        pos_margin: 0.0 (code).
        neg_margin: 1.0 (code); a cosine distance, so at most 2.
        negatives: `sample`, as in the code with its batch of 1, or `batch`.
        foreground: tokens of which the subject covers less than this share are left out; 0 keeps
            all, as the code does (see the pitfall of white padding in README.md).
        impl: which implementation computes pull and push; see `reference_alignment_loss`.
    """

    name: Literal["refalign"] = "refalign"
    blocks: tuple[int, ...] = tuple(range(9))
    teacher: str
    neg_weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    pos_margin: float = Field(default=0.0, ge=0.0, le=2.0)
    neg_margin: float = Field(default=1.0, ge=0.0, le=2.0)
    negatives: Negatives = "sample"
    foreground: float = Field(default=0.0, ge=0.0, le=1.0)
    impl: Annotated[str, implementation_of(OPERATION)] = "auto"

    @property
    def couples_samples(self) -> bool:
        return self.negatives == "batch"

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """Neighbouring blocks, as the paper's first nine of 30, and the push."""
        return super().search_space | {
            "blocks": DepthRange(up_to=0.6, most=0.4),
            "neg_weight": NumberRange(0.0, 2.0),
        }


@final
class RefAlign(Objective):
    """Pulls reference tokens to the teacher's, pushes them from other subjects' teacher tokens.

    One projector per block.
    """

    Config: ClassVar[type[ObjectiveConfig]] = RefAlignConfig
    tokens: ClassVar[Literal["video", "reference"]] = "reference"
    paper: ClassVar[str] = "2603.25743"

    def __init__(
        self,
        config: RefAlignConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: RefAlignConfig = config
        generator = torch.Generator().manual_seed(seed)
        teacher_dim = teacher_dims[config.teacher]
        self.projectors = nn.ModuleDict(
            {
                f"block_{block}": refalign_projector(student_dim, teacher_dim, generator)
                for block in config.blocks
            }
        )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"foreground"} if self.config.foreground > 0 else ())

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        config, features = self.config, teacher[self.config.teacher]
        tapped = student[config.blocks[0]]  # grid and ids are the same in every block
        if features.grid[0] != tapped.grid[0]:
            raise ValueError(
                f"student grid {tapped.grid} and teacher grid {features.grid} hold different "
                "numbers of references"
            )
        teacher_BND = match_grid(features.tokens_BTPD, features.grid, tapped.grid).flatten(1, 2)
        student_LBND = torch.stack(
            [project(self.projectors[f"block_{b}"], student[b].tokens_BND) for b in config.blocks]
        )
        ids_BN, host_ids_BN = self._ids(tapped, context)
        # All blocks at once, so that a fused kernel is launched once.
        total_LB, pull_LB, push_LB = reference_alignment_loss(
            student_LBND,
            teacher_BND,
            ids_BN,
            host_ids_BN=host_ids_BN,
            pos_margin=config.pos_margin,
            neg_margin=config.neg_margin,
            neg_weight=config.neg_weight,
            negatives=config.negatives,
            impl=config.impl,
        )
        parts = {"pull": pull_LB.detach().mean(0), "push": push_LB.detach().mean(0)}
        aligned_B = (ids_BN >= 0).any(1)
        if config.pos_margin == 0:  # then the pull is the mean of 1 - cosine
            cosine_LB = torch.where(aligned_B, 1.0 - pull_LB.detach(), 0.0)
        else:
            cosine_LB = _mean_cosine(student_LBND.detach(), teacher_BND.detach(), ids_BN)
        centered_B = _centered_cosine(student_LBND.detach(), teacher_BND.detach(), ids_BN)
        return Terms(total_LB.mean(0), parts, cosine_LB.mean(0), aligned_B, cosine_LB, centered_B)

    def _ids(self, tapped: Tokens, context: Context) -> tuple[Tensor, Tensor | None]:
        """Subject ids, -1 also for tokens that show too little of their subject, and the same on
        the CPU, if they are known there."""
        ids_BN, host_ids_BN = tapped.subject_ids_BN, tapped.host_ids_BN
        if ids_BN is None:
            raise ValueError("refalign needs reference tokens with subject ids")
        if self.config.foreground == 0:
            return ids_BN, host_ids_BN
        if context.foreground_BN is None:
            raise ValueError("refalign with foreground > 0 needs the foreground of its references")
        host_ids_BN = ids_BN.cpu() if host_ids_BN is None else host_ids_BN
        host_ids_BN = host_ids_BN.where(context.foreground_BN >= self.config.foreground, -1)
        return to_device(host_ids_BN, ids_BN.device), host_ids_BN


def _centered_cosine(student_LBND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    """The same, (B,), of tokens that are centred over those of their sample that show a subject."""
    target_BND = centered(teacher_BND, ids_BN >= 0)
    per_block = [  # one after the other: a copy of one block's tokens at a time
        _mean_cosine(centered(student_BND, ids_BN >= 0)[None], target_BND, ids_BN)
        for student_BND in student_LBND
    ]
    return torch.cat(per_block).mean(0)


def _mean_cosine(student_LBND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    """Mean cosine of matching tokens that show a subject, (L, B); 0 where none does."""
    valid_BN = ids_BN >= 0
    cosine_LBN = paired_cosine(student_LBND, teacher_BND)
    return torch.where(valid_BN, cosine_LBN, 0.0).sum(2) / valid_BN.sum(1).clamp_min(1)
