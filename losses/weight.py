"""What an objective's loss is multiplied by: a number, or one that a training measures.

A loss of any scale can be given the same influence: its weight is then measured so that its
gradient is a given share of the flow loss's (`GradientShare`).
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from torch import Tensor, nn

MAX_WEIGHT = 1e6
MAX_SHARE = 100.0


class GradientShare(BaseModel):
    """A weight at which the objective's gradient is a share of the flow loss's, measured in the
    first steps of a training and held from then on.

    Both gradients are those with respect to the outputs of the objective's `blocks`, reference
    tokens included: a loss pulls there as hard as its norm says, whatever the projectors behind it
    and whichever weights before it are trained. Schedule and warm-up come on top, as on a number.

    Args:
        gradient_share: norm of the objective's gradient over that of the flow loss's.
        steps: in how many steps the norms are measured: the first ones in which schedule and
            warm-up are above 0. Each of them takes the weight from those before it, so that it
            depends on no order of micro-batches; the first one has none yet, and weight 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    gradient_share: float = Field(gt=0.0, le=MAX_SHARE)
    steps: int = Field(default=20, ge=1)


def _kind(value: Any) -> str:
    return "mapping" if isinstance(value, Mapping | GradientShare) else "number"


Weight = Annotated[
    Annotated[float, Field(ge=0.0, allow_inf_nan=False), Tag("number")]
    | Annotated[GradientShare, Tag("mapping")],
    Discriminator(_kind),
]
"""In a recipe: a number from 0 to a million, or `{gradient_share: 0.1}`."""


def weight_in_words(weight: float | GradientShare) -> str:
    """A weight for tables that people read.

    >>> weight_in_words(0.5)
    '0.5'
    >>> weight_in_words(GradientShare(gradient_share=0.1))
    'gradient share 0.1'
    >>> weight_in_words(GradientShare(gradient_share=0.1, steps=5))
    'gradient share 0.1, measured in 5 steps'
    """
    if not isinstance(weight, GradientShare):
        return f"{weight:g}"
    default = GradientShare.model_fields["steps"].default
    measured = "" if weight.steps == default else f", measured in {weight.steps} steps"
    return f"gradient share {weight.gradient_share:g}{measured}"


class MeasuredWeight(nn.Module):
    """Measures the weight of a `GradientShare`, and remembers it in its buffers, in float64.

    The weight is the share times the quotient of two sums over the measured steps, of the flow
    loss's norms and of the objective's. A mean of quotients would be as large as the one step in
    which the objective had nearly nothing to align, and infinite where it had nothing at all.

    The buffers may be on a GPU, for which the host does not wait.

    Args:
        share: from the objective's config.
    """

    flow: Tensor
    own: Tensor
    measured: Tensor

    def __init__(self, share: GradientShare) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("flow", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("own", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("measured", torch.tensor(0))
        self._left = share.steps
        self.register_load_state_dict_post_hook(MeasuredWeight._count_again)  # type: ignore[no-untyped-call]

    @property
    def is_held(self) -> bool:
        """Whether all steps that it takes were measured."""
        return self._left <= 0

    @property
    def num_measured(self) -> int:
        """How many steps were measured."""
        return self.share.steps - self._left

    @property
    def value(self) -> Tensor:
        """The weight in force, a scalar; 0 before a step was measured, and at most `MAX_WEIGHT`."""
        weight = self.share.gradient_share * self.flow / self.own
        return torch.where(self.own > 0, weight, 0.0).clamp_max(MAX_WEIGHT)

    @torch.no_grad()
    def see(self, squares_2: Tensor) -> Tensor:
        """Takes in a step, unless the weight is held.

        Args:
            squares_2: squared norms of the flow loss's gradient and of the objective's unweighted
                one.

        Returns:
            The share that the objective had in this step, a scalar: with the weight that was in
            force; 0 where the flow loss had no gradient.
        """
        flow, own = squares_2.to(self.flow).sqrt()
        share = torch.where(flow > 0, self.value * own / flow, 0.0)
        if not self.is_held:
            self.flow.add_(flow)
            self.own.add_(own)
            self.measured.add_(1)
            self._left -= 1
        return share

    def hold(self) -> None:
        """Measures no more, for what measures a step as most of a training are."""
        self._left = 0

    def why_useless(self) -> str:
        """Why a weight that is held trains nothing; empty if it does. Waits for the device."""
        if not self.is_held:
            return ""
        steps = f"in the {self.share.steps} steps that were measured (weight.steps)"
        if not float(self.own) > 0:
            return f"its loss had no gradient {steps}"
        if not float(self.flow) > 0:
            return f"the flow loss had no gradient {steps}"
        weight = float(self.share.gradient_share * self.flow / self.own)
        if weight > MAX_WEIGHT:
            return (
                f"its gradient {steps} was so small that the weight would be {weight:g}, more than "
                f"{MAX_WEIGHT:g}"
            )
        return ""

    def _count_again(self, _: object) -> None:
        self._left = self.share.steps - int(self.measured)
