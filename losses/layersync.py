"""LayerSync (arXiv 2510.12581): shallow blocks imitate deeper ones of the same forward pass.

No teacher and no projector. Shape letters: B batch, N tokens, D width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self, final

from pydantic import model_validator
from torch import Tensor

from alignlab.kernels.cosine import paired_cosine
from alignlab.losses.objective import (
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
from alignlab.losses.repa import cosine_terms
from alignlab.losses.search_space import DEEP, SHALLOW, SearchRange
from alignlab.losses.token_cosine import TokenCosineSettings, logged_cosines
from alignlab.losses.weight import Weight


def layersync_loss(shallow_BND: Tensor, deep_BND: Tensor, *, detach: bool = True) -> Tensor:
    """Computes minus the mean cosine of the same tokens in two blocks, (B,), in [-1, 1].

    Computed in float32 (float64 from float64) whatever the input dtype.

    Args:
        shallow_BND: tokens of the block that learns.
        deep_BND: those of a deeper block.
        detach: no gradient reaches the deeper block (paper, and the released image code); False:
            both are moved (the released code for Wan).

    Raises:
        ValueError: the two shapes differ.
    """
    if shallow_BND.shape != deep_BND.shape:
        raise ValueError(
            f"shallow {tuple(shallow_BND.shape)} and deep {tuple(deep_BND.shape)} tokens differ"
        )
    return -paired_cosine(shallow_BND, deep_BND.detach() if detach else deep_BND).mean(-1)


class LayerSyncConfig(TokenCosineSettings, NoTeacherConfig):
    """Settings of LayerSync.

    Args:
        blocks: (7,), the paper's depth 8 of 28; pairs with `deep_blocks`, and is averaged over.
        weight: 0.2 (paper and image code); the code for Wan has 0.002.
        deep_blocks: (15,), the paper's depth 16; for each of `blocks` a deeper one.
        detach: no gradient reaches the deeper blocks: true (paper); the code for Wan does not.
    """

    name: Literal["layersync"] = "layersync"
    weight: Weight = 0.2
    blocks: tuple[int, ...] = (7,)
    deep_blocks: tuple[int, ...] = (15,)
    detach: bool = True

    @model_validator(mode="after")
    def _blocks_come_in_pairs(self) -> Self:
        if len(self.blocks) != len(self.deep_blocks):
            raise ValueError(
                f"deep_blocks names {len(self.deep_blocks)} blocks and blocks {len(self.blocks)}: "
                "name a deeper one for each"
            )
        for shallow, deep in zip(self.blocks, self.deep_blocks, strict=True):
            if deep <= shallow:
                raise ValueError(f"deep_blocks: block {deep} is not deeper than block {shallow}")
        return self

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Both sides of the pairs."""
        return {"blocks": self.blocks, "deep_blocks": self.deep_blocks}

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """One block of the shallower half towards one of the deeper half."""
        return super().search_space | {"blocks": SHALLOW, "deep_blocks": DEEP}


@final
class LayerSync(Objective):
    """Minus the cosine of a block's video tokens with those of a deeper block; no teacher."""

    Config: ClassVar[type[ObjectiveConfig]] = LayerSyncConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    reads: ClassVar[Reads] = "nothing"
    paper: ClassVar[str] = "2510.12581"
    config: LayerSyncConfig

    def __init__(
        self,
        config: LayerSyncConfig,
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
        config, losses, logged = self.config, [], []
        for pair in zip(config.blocks, config.deep_blocks, strict=True):
            shallow_BTPD, deep_BTPD = (
                student[block].tokens_BND.unflatten(1, (student[block].grid[0], -1))
                for block in pair
            )
            losses.append(
                layersync_loss(
                    config.compared(shallow_BTPD).flatten(1, 2),
                    config.compared(deep_BTPD).flatten(1, 2),
                    detach=config.detach,
                )
            )
            logged.append(logged_cosines(shallow_BTPD, deep_BTPD))
        return cosine_terms(losses, logged, len(losses))
