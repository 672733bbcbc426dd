"""Dispersive loss (arXiv 2506.09027): the samples of a batch are pushed apart, towards nothing.

No teacher and no projector: what regularisation alone gives. Shape letters: B batch, N tokens, D
width.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from alignlab.kernels.cosine import accumulation_dtype
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
from alignlab.losses.search_space import SearchRange, tenfold
from alignlab.losses.weight import Weight


def dispersive_loss(
    student_BND: Tensor,
    *,
    tau: float = 0.5,
    per_feature: bool = False,
    diagonal: bool = False,
) -> Tensor:
    """Computes `log mean exp(-|z_i - z_j|^2 / tau)` over the pairs of a batch, (B,): all alike.

    z_i are all tokens of sample i, flattened. Computed in float32 (float64 from float64) whatever
    the input dtype, with the largest term taken out, so that far samples do not underflow.

    Args:
        student_BND: at least two samples.
        tau: temperature, 0.5 (paper).
        per_feature: divide the squared distance by the N*D features, as the released code does.
        diagonal: count i = j as well, whose distance is 0, as the released code does; else i != j.

    Returns:
        One value for each sample, the batch's, so that their mean is the loss.

    Raises:
        ValueError: there is one sample, and no pair.
    """
    batch = len(student_BND)
    if batch < 2:
        raise ValueError(f"dispersive compares samples, and there is {batch}: give two or more")
    z_BF = student_BND.flatten(1).to(accumulation_dtype(student_BND))
    # pairs once; not |a|^2 + |b|^2 - 2ab, whose difference loses what near samples differ by
    square_P = torch.nn.functional.pdist(z_BF).square()
    if per_feature:
        square_P = square_P / z_BF.shape[1]
    exponent_P = -square_P / tau + math.log(2)  # each pair stands for two
    count = batch * (batch - 1)
    if diagonal:
        exponent_P = torch.cat([exponent_P, exponent_P.new_full((1,), math.log(batch))])
        count += batch
    loss: Tensor = torch.logsumexp(exponent_P, 0) - math.log(count)
    return loss.expand(batch)


class DispersiveConfig(NoTeacherConfig):
    """Settings of the dispersive loss.

    Args:
        blocks: (7,), a quarter of 30 blocks (paper: a quarter of the depth); several are averaged.
        weight: 0.5 (paper); the released code for SiT has 0.25.
        tau: temperature, 0.5 (paper); the released code has none, which is 1.
        per_feature: divide squared distances by the number of features: true (code). As the paper
            writes it, without, the loss of long clips is thousands and its gradient as large.
        diagonal: count each sample with itself: true (code), which keeps the loss above minus the
            logarithm of the batch. Without it (paper) the loss has no floor, and a training that
            nothing else holds goes on pushing until it diverges (losses/README.md).
    """

    name: Literal["dispersive"] = "dispersive"
    weight: Weight = 0.5
    blocks: tuple[int, ...] = (7,)
    tau: float = Field(default=0.5, gt=0.0, allow_inf_nan=False)
    per_feature: bool = True
    diagonal: bool = True

    @property
    def couples_samples(self) -> bool:
        """The loss is of the pairs of a batch."""
        return True

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """And the temperature."""
        return super().search_space | {"tau": tenfold(0.5)}


@final
class Dispersive(Objective):
    """Pushes the samples of a step apart in the tokens of a block; no teacher."""

    Config: ClassVar[type[ObjectiveConfig]] = DispersiveConfig
    tokens: ClassVar[Literal["video", "reference"]] = "video"
    reads: ClassVar[Reads] = "nothing"
    whole_step: ClassVar[bool] = True
    paper: ClassVar[str] = "2506.09027"
    config: DispersiveConfig

    def __init__(
        self,
        config: DispersiveConfig,
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
        config = self.config
        per_block = [
            dispersive_loss(
                student[block].tokens_BND,
                tau=config.tau,
                per_feature=config.per_feature,
                diagonal=config.diagonal,
            )
            for block in config.blocks
        ]
        loss_B = torch.stack(per_block).mean(0)
        return Terms(loss_B, {"disperse": loss_B.detach()})
