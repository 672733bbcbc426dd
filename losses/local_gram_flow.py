"""Local Gram flow (SAM2VideoX, arXiv 2512.11792): a token resembles its surroundings in the next
frame as it does in the teacher.

Shape letters: B batch, T frames, H, W tokens of a frame, P = H*W, N = T*P, D width.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from alignlab.kernels.local_gram import OPERATION, Impl, local_gram
from alignlab.losses.grids import Side, student_on, teacher_on
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Objective,
    ObjectiveConfig,
    Terms,
    Tokens,
    implementation_of,
)
from alignlab.losses.projector import project, repa_projector
from alignlab.losses.search_space import SearchRange, tenfold


def local_gram_flow_loss(
    student_BTHWD: Tensor,
    teacher_BTHWD: Tensor,
    *,
    window: int = 7,
    temperature: float = 0.1,
    normalize: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Computes KL(teacher || student) of where each token goes in the next frame, (B,).

    Of a token in frame t the dot products with the `window` x `window` tokens around its place in
    frame t+1, divided by the temperature, as a softmax; with p of the teacher and q of the student,
    the mean of sum_k p_k (log p_k - log q_k) over all tokens but the last frame's. What lies
    outside the frame is in no softmax. Computed in float32 (float64 from float64) whatever the
    input dtype, also under autocast. Memory is linear in tokens: numbers for each place of the
    window, and no copies of features for each. No gradient reaches the teacher.

    Args:
        student_BTHWD: already projected; D may be another than the teacher's.
        teacher_BTHWD: on the same grid.
        window: odd, 7 (paper).
        temperature: 0.1 (paper).
        normalize: compare vectors of unit length, and so cosines.
        impl: see `alignlab.kernels.local_gram.local_gram`.

    Raises:
        ValueError: the grids differ, there is one frame, the window is even, or `impl` cannot run.
    """
    return local_gram(
        student_BTHWD,
        teacher_BTHWD.detach(),
        window=window,
        temperature=temperature,
        normalize=normalize,
        impl=impl,
    ).divergence


class LocalGramFlowConfig(ObjectiveConfig):
    """Settings of the local Gram flow.

    Args:
        blocks: (25,), as in a port to Wan (0-based); several blocks are averaged.
        weight: 0.5, as REPA's (ours).
        teacher: one alias; the paper's is SAM 2.
        window: side of the window in the next frame, odd, 7 (paper).
        temperature: of both softmaxes, 0.1 (paper).
        normalize: compare vectors of unit length: true (port).
        grid: whose grid is compared on: `student`, frames being latent ones (ours), or `teacher`.
        projector_dim: hidden width of the projectors, 512 (port).
        impl: see `alignlab.kernels.local_gram.local_gram`.
    """

    name: Literal["local_gram_flow"] = "local_gram_flow"
    weight: float = Field(default=0.5, ge=0.0, allow_inf_nan=False)
    blocks: tuple[int, ...] = (25,)
    teacher: str
    window: int = Field(default=7, ge=3)
    temperature: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    normalize: bool = True
    grid: Side = "student"
    projector_dim: int = Field(default=512, ge=1)
    impl: Annotated[str, implementation_of(OPERATION)] = "auto"

    @field_validator("window")
    @classmethod
    def _window_has_a_middle(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError(f"window {window} has no middle: give an odd one")
        return window

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And the temperature of both softmaxes."""
        return super().search_space | {"temperature": tenfold(0.1)}


@final
class LocalGramFlow(Objective):
    """Where each video token goes in the next frame, by its likeness, as the teacher says.

    One projector for each block, averaged over all.
    """

    Config: ClassVar[type[ObjectiveConfig]] = LocalGramFlowConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2512.11792"
    config: LocalGramFlowConfig

    def __init__(
        self,
        config: LocalGramFlowConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        generator, width = torch.Generator().manual_seed(seed), teacher_dims[config.teacher]
        self.projectors = nn.ModuleDict(
            {
                f"block_{block}": repa_projector(
                    student_dim, width, config.projector_dim, generator
                )
                for block in config.blocks
            }
        )

    @property
    def side(self) -> Side:
        """On whose grid student and teacher meet."""
        return self.config.grid

    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        config, features = self.config, teacher[self.config.teacher]
        grid = student[config.blocks[0]].grid  # the same in every block
        teacher_BTPD = teacher_on(config.grid, features.tokens_BTPD, features.grid, grid)
        size = (features.grid if config.grid == "teacher" else grid)[1:]
        per_block = []
        for block in config.blocks:
            projected_BND = project(self.projectors[f"block_{block}"], student[block].tokens_BND)
            student_BTPD = student_on(config.grid, projected_BND, grid, features.grid)
            per_block.append(
                local_gram_flow_loss(
                    student_BTPD.unflatten(2, size),
                    teacher_BTPD.unflatten(2, size),
                    window=config.window,
                    temperature=config.temperature,
                    normalize=config.normalize,
                    impl=config.impl,
                )
            )
        loss_B = torch.stack(per_block).mean(0)
        return Terms(loss_B, {"flow_kl": loss_B.detach()})
