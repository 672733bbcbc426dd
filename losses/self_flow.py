"""Self-Flow (arXiv 2603.06507): two noise levels in a sample; shallow blocks follow deeper ones of
the student's own moving average, which sees the cleaner of the two everywhere.

Shape letters: B batch, N tokens, D width.
"""

from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from alignlab.losses.objective import ObjectiveConfig, TwoLevelConfig
from alignlab.losses.projector import REPA_HIDDEN
from alignlab.losses.search_space import NumberRange, SearchRange
from alignlab.losses.sra import SelfAlignment, self_alignment_loss
from alignlab.losses.token_cosine import TokenCosineSettings
from alignlab.losses.weight import Weight


class SelfFlowConfig(TokenCosineSettings, TwoLevelConfig):
    """Settings of Self-Flow.

    Args:
        blocks: (8,), at 0.3 of Wan's 30 (paper: about 0.3 of the depth); several are averaged.
        weight: 0.8 (paper).
        deep_blocks: (20,), at 0.7 of Wan's 30 (paper: about 0.7 of the depth).
        projector_dim: hidden width of the heads, 2048, as REPA's (ours).
    """

    name: Literal["self_flow"] = "self_flow"
    weight: Weight = 0.8
    blocks: tuple[int, ...] = (8,)
    deep_blocks: tuple[int, ...] = Field(default=(20,), min_length=1)
    projector_dim: int = Field(default=REPA_HIDDEN, ge=1)

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And the share of tokens with the second noise level."""
        return super().search_space | {"mask_ratio": NumberRange(0.05, 0.5)}


@final
class SelfFlow(SelfAlignment):
    """Video tokens of two noise levels follow a deeper block of the average, which sees less noise.

    One head for each pair of blocks, averaged over all.
    """

    Config: ClassVar[type[ObjectiveConfig]] = SelfFlowConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    paper: ClassVar[str] = "2603.06507"
    config: SelfFlowConfig

    def _loss(self, student_BTPD: Tensor, target_BTPD: Tensor) -> Tensor:
        sides = map(self.config.compared, (student_BTPD, target_BTPD))
        return self_alignment_loss(*(side.flatten(1, 2) for side in sides))
