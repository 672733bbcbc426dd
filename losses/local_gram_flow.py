"""Local Gram flow (SAM2VideoX, arXiv 2512.11792): a token resembles its surroundings in the next
frame as it does in the teacher.

Shape letters: B batch, T frames, H, W tokens of a frame, P = H*W, N = T*P, D width, K places of a
window.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.kernels.cosine import accumulation_dtype, unit
from alignlab.losses.grids import Side, student_on, teacher_on
from alignlab.losses.objective import (
    NO_CONTEXT,
    Context,
    Features,
    Objective,
    ObjectiveConfig,
    Terms,
    Tokens,
)
from alignlab.losses.projector import project, repa_projector
from alignlab.losses.search_space import SearchRange, tenfold
from alignlab.losses.weight import Weight

OUTSIDE = -1e30  # of a softmax: no share, and finite, so that no gradient is NaN


def local_gram_flow_loss(
    student_BTHWD: Tensor,
    teacher_BTHWD: Tensor,
    *,
    window: int = 7,
    temperature: float = 0.1,
    normalize: bool = False,
) -> Tensor:
    """Computes KL(teacher || student) of where each token goes in the next frame, (B,).

    Of a token in frame t the dot products with the `window` x `window` tokens around its place in
    frame t+1, as a softmax; the mean of the divergences over all tokens but the last frame's. What
    lies outside the frame is in no softmax. Computed in float32 (float64 from float64) whatever the
    input dtype, also under autocast. Memory is linear in tokens: a number for each place of the
    window, and no copies of features. No gradient reaches the teacher.

    Args:
        student_BTHWD: already projected; D may be another than the teacher's.
        teacher_BTHWD: on the same grid.
        window: odd, 7 (paper).
        temperature: 0.1 (paper).
        normalize: compare vectors of unit length, and so cosines.

    Raises:
        ValueError: the grids differ, there is one frame, or the window is even.
    """
    if student_BTHWD.shape[:4] != teacher_BTHWD.shape[:4]:
        raise ValueError(
            f"student {tuple(student_BTHWD.shape)} and teacher {tuple(teacher_BTHWD.shape)} differ"
        )
    if student_BTHWD.shape[1] < 2:
        raise ValueError("local_gram_flow compares a frame with the next, and there is one")
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window {window} has no middle: give an odd one, 3 or more")
    dtype = accumulation_dtype(student_BTHWD, teacher_BTHWD)
    student_BTHWD, teacher_BTHWD = (
        unit(x, dtype) if normalize else x.to(dtype)
        for x in (student_BTHWD, teacher_BTHWD.detach())
    )
    height, width = student_BTHWD.shape[2:4]
    outside_HWK = _outside(height, width, window, student_BTHWD.device)
    with torch.autocast(student_BTHWD.device.type, enabled=False):  # products would be bfloat16
        log_student, log_teacher = (
            F.log_softmax(
                (next_frame_products(x, window) / temperature).masked_fill(outside_HWK, OUTSIDE), -1
            )
            for x in (student_BTHWD, teacher_BTHWD)
        )
    share = log_teacher.exp()
    divergence = share * (log_teacher - log_student)  # 0 outside, where the share is
    return divergence.sum(-1).mean((1, 2, 3))


def next_frame_products(tokens_BTHWD: Tensor, window: int) -> Tensor:
    """Computes dot products of each token with those around its place a frame later.

    Returns:
        (B, T-1, H, W, K), K = `window`^2 in row-major order; 0 with what lies outside the frame.
    """
    height, width = tokens_BTHWD.shape[2:4]
    reach = window // 2
    now, later = tokens_BTHWD[:, :-1], F.pad(tokens_BTHWD[:, 1:], (0, 0, *[reach] * 4))
    # one place of the window after the other: each is a view, where an unfold copies K of them
    return torch.stack(
        [
            torch.linalg.vecdot(now, later[:, :, row : row + height, column : column + width])
            for row in range(window)
            for column in range(window)
        ],
        dim=-1,
    )


def _outside(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Which places of the window around each token are outside the frame, bool (H, W, K)."""
    offsets = torch.arange(window, device=device) - window // 2
    rows_HR = torch.arange(height, device=device)[:, None] + offsets
    columns_WR = torch.arange(width, device=device)[:, None] + offsets
    row_out, column_out = (
        (rows_HR < 0) | (rows_HR >= height),
        (columns_WR < 0) | (columns_WR >= width),
    )
    return (row_out[:, None, :, None] | column_out[None, :, None, :]).flatten(2)


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
    """

    name: Literal["local_gram_flow"] = "local_gram_flow"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (25,)
    teacher: str
    window: int = Field(default=7, ge=3)
    temperature: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    normalize: bool = True
    grid: Side = "student"
    projector_dim: int = Field(default=512, ge=1)

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
                )
            )
        loss_B = torch.stack(per_block).mean(0)
        return Terms(loss_B, {"flow_kl": loss_B.detach()})
