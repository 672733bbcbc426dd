"""VAE-REPA (arXiv 2601.17830): video tokens point where the clean latents of their patches point.

No vision model: the target is in memory anyway. Shape letters: B batch, N tokens, D width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from alignlab.losses.objective import (
    LATENTS,
    NO_CONTEXT,
    Context,
    Features,
    NoTeacherConfig,
    Objective,
    ObjectiveConfig,
    Reads,
    Terms,
    Tokens,
)
from alignlab.losses.projector import REPA_HIDDEN, project, repa_projector
from alignlab.losses.repa import cosine_terms, repa_loss
from alignlab.losses.token_cosine import TokenCosineSettings, logged_cosines
from alignlab.losses.weight import Weight


def vae_alignment_loss(student_BND: Tensor, latents_BND: Tensor) -> Tensor:
    """Computes minus the mean cosine of tokens with the clean latents of their patches, (B,).

    Computed in float32 (float64 from float64) whatever the input dtype. No gradient reaches the
    latents.

    Args:
        student_BND: student tokens, already projected to the width of a patch.
        latents_BND: of each token its patch of clean latents, flattened
            (`alignlab.losses.grids.patch_tokens`).

    Raises:
        ValueError: the two shapes differ.
    """
    return repa_loss(student_BND, latents_BND)


class VaeRepaConfig(TokenCosineSettings, NoTeacherConfig):
    """Settings of VAE-REPA.

    Args:
        blocks: (7,), as REPA's (ours); several blocks are averaged.
        weight: 0.5, as REPA's (ours).
        projector_dim: hidden width of the projectors, 2048, as REPA's (ours).
    """

    name: Literal["vae_repa"] = "vae_repa"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (7,)
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)


@final
class VaeRepa(Objective):
    """Minus the cosine of video tokens with the clean latents of their patches; no teacher.

    One projector for each block, averaged over all.
    """

    Config: ClassVar[type[ObjectiveConfig]] = VaeRepaConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    reads: ClassVar[Reads] = "latents"
    paper: ClassVar[str] = "2601.17830"
    config: VaeRepaConfig

    def __init__(
        self,
        config: VaeRepaConfig,
        *,
        student_dim: int,
        teacher_dims: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        generator, width = torch.Generator().manual_seed(seed), teacher_dims[LATENTS]
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
        latents_BTPD, compared = teacher[LATENTS].tokens_BTPD, self.config.compared
        target_BND = compared(latents_BTPD).flatten(1, 2)
        losses, logged = [], []
        for block in self.config.blocks:
            tapped = student[block]
            projected_BND = project(self.projectors[f"block_{block}"], tapped.tokens_BND)
            student_BTPD = projected_BND.unflatten(1, (tapped.grid[0], -1))
            losses.append(vae_alignment_loss(compared(student_BTPD).flatten(1, 2), target_BND))
            logged.append(logged_cosines(student_BTPD, latents_BTPD))
        return cosine_terms(losses, logged, len(losses))
