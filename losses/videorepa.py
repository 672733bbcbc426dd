"""VideoREPA (arXiv 2505.23656): video tokens relate to each other as a frozen video model's do.

Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width; H, W token grid.
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
    Relation,
    check_distance,
    mean_relation,
    plain_relation,
)
from alignlab.losses.grids import drops_first_frame, student_on, teacher_on
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Grid,
    Objective,
    ObjectiveConfig,
    Side,
    Terms,
    Tokens,
    changed_default,
    implementation_of,
)
from alignlab.losses.projector import (
    REPA_HIDDEN,
    InitialWeights,
    pooling_convolution,
    project,
    project_frames,
    repa_projector,
)
from alignlab.losses.search_space import NumberRange, SearchRange
from alignlab.losses.weight import Weight

Reduction = Literal["joint", "sum"]


def token_relation_loss(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    *,
    margin: float = 0.1,
    reduction: Reduction = "joint",
    distance: Distance = "l1",
    impl: Impl = "auto",
) -> Tensor:
    """Computes the token relation distillation loss of each sample, (B,), >= 0.

    The mean over pairs of tokens of `[ |cos among student - cos among teacher| - margin ]_+`. Only
    relations count: the loss does not change when tokens are scaled one by one, or all are rotated
    together. No gradient reaches the teacher.

    Args:
        student_BTPD: student tokens; their width need not be the teacher's.
        teacher_BTPD: teacher tokens at the same places.
        margin: difference of two cosines that is free of charge, 0.1 (paper and code).
        reduction: "joint" takes one mean over all pairs of the clip (released code); "sum" adds the
            mean over pairs of one frame and the mean over pairs of different frames (paper), which
            counts pairs of one frame about T times as much.
        distance: "l2" squares what a pair costs beyond the margin; with a margin of 0 that is
            dREPA, but for its mean over pairs i != j: N / (N - 1) times as much, of N tokens.
        impl: see `alignlab.kernels.relation.relation_distance`.

    Raises:
        ValueError: shapes do not fit, a setting has no meaning, or `impl` cannot run.
    """
    means = plain_relation(student_BTPD, teacher_BTPD, margin=margin, distance=distance, impl=impl)
    return _reduced(means, reduction)


def _reduced(means: Relation, reduction: Reduction) -> Tensor:
    match reduction:
        case "joint":
            return means.joint
        case "sum":
            return means.spatial + means.temporal
    raise ValueError(f"unknown reduction {reduction!r}: choose joint, sum")


class VideoRepaConfig(ObjectiveConfig):
    """Settings of VideoREPA.

    Args:
        blocks: (17,), the paper's depth 18; several blocks are averaged.
        weight: 0.5 (paper and code).
        margin: 0.1 (paper and code).
        reduction: "joint" (code) or "sum" (paper); see `token_relation_loss`.
        distance: "l1" (paper and code), or "l2", as dREPA has it; see `token_relation_loss`.
        first_frame: "drop" leaves the first latent frame out (code); "keep" needs a teacher that
            saw the first frame by itself.
        pool: side of the square of student tokens that a learned convolution makes one of, after
            the projector (code: 3). 1 leaves it out.
        grid: whose token grid is used: "teacher" resamples the (pooled) student (code), "student"
            averages and resamples the teacher, which makes fewer tokens of an image teacher's many.
        projector_dim: hidden width of the projectors, 2048 (code).
        initial_weights: of the projectors: "torch", its default for linear layers (code), or
            "xavier", REPA's: Xavier-uniform with zero biases.
        impl: which implementation compares the relations; see `token_relation_loss`.
    """

    name: Literal["videorepa"] = "videorepa"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (17,)
    teacher: str
    margin: float = Field(default=0.1, ge=0.0, le=2.0)
    reduction: Reduction = "joint"
    distance: Distance = "l1"
    first_frame: Literal["drop", "keep"] = "drop"
    pool: int = Field(default=1, ge=1)
    grid: Side = "teacher"
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)
    initial_weights: InitialWeights = changed_default("torch", before="xavier")
    impl: Annotated[str, implementation_of(OPERATION)] = "auto"

    @model_validator(mode="after")
    def _distance_is_computed(self) -> Self:
        check_distance(self.distance, self.impl)
        return self

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And the margin."""
        return super().search_space | {"margin": NumberRange(0.0, 0.4)}


@final
class VideoRepa(Objective):
    """Difference of the similarities among video tokens from those among the teacher's.

    One projector per block; blocks are averaged.
    """

    Config: ClassVar[type[ObjectiveConfig]] = VideoRepaConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2505.23656"

    def __init__(
        self,
        config: VideoRepaConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config: VideoRepaConfig = config
        generator = torch.Generator().manual_seed(seed)
        width = teacher_dims[config.teacher]
        self.projectors, self.pools = nn.ModuleDict(), nn.ModuleDict()
        for block in config.blocks:
            self.projectors[f"block_{block}"] = repa_projector(
                student_dim,
                width,
                config.projector_dim,
                generator,
                initial=config.initial_weights,
            )
            if config.pool > 1:
                self.pools[f"block_{block}"] = pooling_convolution(width, config.pool, generator)

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
        grid = self._pooled_grid(student[config.blocks[0]].grid)  # the same in every block
        teacher_BTPD = teacher_on(config.grid, features.tokens_BTPD, features.grid, grid)
        first = self._first_frame(grid, features.grid)
        teacher_BTPD = teacher_BTPD[:, first:]
        if not teacher_BTPD.shape[1]:
            raise ValueError("videorepa: first_frame=drop leaves nothing of a clip of one frame")
        per_block = []
        for block in config.blocks:
            projected_BND = self._projected(block, student[block])
            student_BTPD = student_on(config.grid, projected_BND, grid, features.grid)[:, first:]
            per_block.append(
                plain_relation(
                    student_BTPD,
                    teacher_BTPD,
                    margin=config.margin,
                    distance=config.distance,
                    impl=config.impl,
                )
            )
        mean = mean_relation(per_block)
        parts = {"spatial": mean.spatial.detach(), "temporal": mean.temporal.detach()}
        return Terms(_reduced(mean, config.reduction), parts)

    def _first_frame(self, grid: Grid, teacher_grid: Grid) -> int:
        """The first frame on the common grid that is compared: 1 leaves out what 0 keeps."""
        dropped = drops_first_frame(grid, teacher_grid)
        if self.config.first_frame == "keep" and dropped:
            raise ValueError(
                f"videorepa: first_frame=keep, but the teacher (grid {teacher_grid}) left the "
                f"first of the student's frames (grid {grid}) out: set first_frame=drop"
            )
        return int(self.config.first_frame == "drop" and not dropped)

    def _projected(self, block: int, tapped: Tokens) -> Tensor:
        """Projected tokens of a block, pooled, (B, N, D)."""
        projected_BND = project(self.projectors[f"block_{block}"], tapped.tokens_BND)
        if self.config.pool == 1:
            return projected_BND
        # Per frame and linear, so it could as well come after the resampling in time (code).
        return project_frames(self.pools[f"block_{block}"], projected_BND, tapped.grid)

    def _pooled_grid(self, grid: Grid) -> Grid:
        pool, (frames, height, width) = self.config.pool, grid
        if height % pool or width % pool:
            raise ValueError(f"videorepa: pool={pool} does not divide the grid {grid}")
        return frames, height // pool, width // pool
