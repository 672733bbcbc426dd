"""MoAlign (arXiv 2510.19022): video tokens relate to each other as a teacher's motion does.

The teacher's tokens go through a frozen motion head (Stage 1), which keeps of them what explains
optical flow.
Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alignlab.kernels.relation import (
    OPERATION,
    Distance,
    Impl,
    check_distance,
    mean_relation,
    plain_relation,
)
from alignlab.losses.grids import student_on, teacher_on
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Objective,
    ObjectiveConfig,
    Side,
    Terms,
    Tokens,
    implementation_of,
)
from alignlab.losses.projector import REPA_HIDDEN, deep_projector, project
from alignlab.losses.search_space import SearchRange, tenfold
from alignlab.losses.stage1.folder import load_for_teacher
from alignlab.losses.stage1.motion_head import MotionHead
from alignlab.losses.weight import Weight


def motion_relation_loss(
    student_BTPD: Tensor,
    motion_BTPD: Tensor,
    *,
    tau: float = 10.0,
    distance: Distance = "l1",
    impl: Impl = "auto",
) -> Tensor:
    """Computes `spatial + temporal` for each sample, (B,), >= 0.

    Both are means of `|cos among student - cos among motion|`, over all pairs of tokens of one
    frame and over all pairs of different frames; the latter are multiplied by
    `exp(-frames apart / tau)` and divided by their number, not by the sum of these weights. No
    gradient reaches the motion.

    Args:
        student_BTPD: student tokens; their width need not be that of the motion space.
        motion_BTPD: motion tokens at the same places.
        tau: 10.0 (paper).
        distance: "l2" squares the differences, as dREPA does.
        impl: see `alignlab.kernels.relation.relation_distance`.

    Raises:
        ValueError: shapes do not fit, `tau` is not above 0, or `impl` cannot run.
    """
    means = plain_relation(student_BTPD, motion_BTPD, tau=tau, distance=distance, impl=impl)
    return means.spatial + means.temporal


class MoAlignConfig(ObjectiveConfig):
    """Settings of MoAlign's Stage 2.

    Args:
        blocks: (17,), the paper's block 18; several blocks are averaged.
        weight: 0.5 (paper).
        tau: decay over frames of the temporal part, 10.0 (paper).
        distance: "l1" (paper), or "l2"; see `motion_relation_loss`.
        head: folder of the Stage 1 network; `alignlab stage1 moalign` makes one.
        grid: whose token grid is used: "teacher" resamples the student (ours), "student" averages
            and resamples the motion, which makes fewer tokens of an image teacher's many.
        projector_dim: hidden width of the projectors, 2048 (ours; the paper says 4 layers).
        impl: which implementation compares the relations; see `motion_relation_loss`.
    """

    name: Literal["moalign"] = "moalign"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (17,)
    teacher: str
    tau: float = Field(default=10.0, gt=0.0, allow_inf_nan=False)
    distance: Distance = "l1"
    head: str = Field(min_length=1)
    grid: Side = "teacher"
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)
    impl: Annotated[str, implementation_of(OPERATION)] = "auto"

    @model_validator(mode="after")
    def _distance_is_computed(self) -> Self:
        check_distance(self.distance, self.impl)
        return self

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And the decay over frames."""
        return super().search_space | {"tau": tenfold(10.0)}


@final
class MoAlign(Objective):
    """Difference of the similarities among video tokens from those among the teacher's motion.

    One projector per block; blocks are averaged. The motion comes from a frozen Stage 1 network.
    """

    Config: ClassVar[type[ObjectiveConfig]] = MoAlignConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2510.19022"

    def __init__(
        self,
        config: MoAlignConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: MoAlignConfig = config
        head = load_for_teacher(
            config.head, "moalign", config.teacher, teacher_dims[config.teacher]
        )
        assert isinstance(head, MotionHead)
        self.head = head
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ModuleDict(
            {
                f"block_{block}": deep_projector(
                    student_dim, self.head.config.width, config.projector_dim, generator
                )
                for block in config.blocks
            }
        )

    @property
    def side(self) -> Side:
        return self.config.grid

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        config, features = self.config, teacher[self.config.teacher]
        # frozen: in the precision of its weights, as teachers are
        with torch.no_grad(), torch.autocast(features.tokens_BTPD.device.type, enabled=False):
            motion_BTPD = self.head.motion(features.tokens_BTPD, features.grid)
        grid = student[config.blocks[0]].grid  # the same in every block
        target_BTPD = teacher_on(config.grid, motion_BTPD, features.grid, grid)
        per_block = []
        for block in config.blocks:
            projected_BND = project(self.projectors[f"block_{block}"], student[block].tokens_BND)
            student_BTPD = student_on(config.grid, projected_BND, grid, features.grid)
            per_block.append(
                plain_relation(
                    student_BTPD,
                    target_BTPD,
                    tau=config.tau,
                    distance=config.distance,
                    impl=config.impl,
                )
            )
        mean = mean_relation(per_block)
        parts = {"spatial": mean.spatial.detach(), "temporal": mean.temporal.detach()}
        return Terms(mean.spatial + mean.temporal, parts)
