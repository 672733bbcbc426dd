"""Settings of objectives that compare attention maps, of blocks with those of a teacher's layers.

The harness taps queries and keys where a config derives from `AttentionConfig`, and outputs of
blocks otherwise.
"""

from pydantic import field_validator

from alignlab.losses.objective import ObjectiveConfig
from alignlab.losses.weight import GradientShare, Weight


class AttentionConfig(ObjectiveConfig):
    """Settings of an objective that compares self-attention maps. Its `tokens` are the video's.

    `forward` gets, in place of hidden tokens, queries and keys: those of each of `blocks`
    (`Tokens.heads`) and of the layers that the teachers' features name (`Features.heads`). A recipe
    whose teacher gives other features is refused, and so is a weight that would be measured.
    """

    @field_validator("weight", check_fields=False)
    @classmethod
    def _is_a_number(cls, weight: Weight) -> Weight:
        if isinstance(weight, GradientShare):
            raise ValueError(
                "gradient_share is measured at what a block puts out, and its attention maps are "
                "made before that; give a number"
            )
        return weight

    def pairs(self, layers: int) -> list[tuple[int, int]]:
        """Which block is compared with which layer of the teachers.

        The first with the first, and so on. A single block goes with every layer, a single layer
        with every block.

        Args:
            layers: of all teachers, in the order of `teachers`.

        Returns:
            The block and the number of the layer, from 0, of each pair.

        Raises:
            ValueError: there are as many neither of both nor of one.
        """
        blocks, most = len(self.blocks), max(len(self.blocks), layers)
        if not layers or any(count not in (1, most) for count in (blocks, layers)):
            raise ValueError(
                f"names {blocks} blocks, and the teacher's feature {layers} layers: give as many, "
                "or one of either"
            )
        return [(self.blocks[i % blocks], i % layers) for i in range(most)]
