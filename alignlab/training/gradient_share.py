"""How hard the flow loss and each objective pull at the blocks that are aligned.

For weights that are a share of the flow loss's gradient (`alignlab.losses.weight.GradientShare`):
norms of gradients with respect to what the blocks put out, which no optimizer, projector or choice
of trained weights changes. Shape letters: B samples of a micro-batch, L tokens of a sample's video
and references, D width; G samples that ran together.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignlab.errors import UserError

Outputs = Mapping[int, Sequence[Tensor]]
"""What the blocks put out in a forward pass, by block: (G, L, D) of each group of samples."""


def gradient_squares(
    flow_B: Tensor,
    losses: Mapping[str, Tensor],
    blocks: Mapping[str, Sequence[int]],
    outputs: Outputs,
) -> dict[str, Tensor]:
    """Squared norms of the gradients of the flow loss and of each objective's, at its blocks.

    Of sums over the samples: those of micro-batches and ranks add up to those of the whole step, of
    which no sample sees another, and the step's mean divides both by the same number. It costs a
    backward pass of the flow loss down to the lowest of the blocks, and one of each objective from
    its loss to its blocks. The graph stays for the backward pass of the step, and so do all bits of
    that.

    Args:
        flow_B: the flow loss, as it enters the step.
        losses: by alias, the unweighted losses (B,) of the objectives that are measured.
        blocks: by alias, those that the objective aligns.
        outputs: of the forward pass.

    Returns:
        By alias (2,), fp32: the flow loss's and the objective's.

    Raises:
        UserError: no trained weight lies in an objective's block or before it.
    """
    if not losses:
        return {}
    for alias in losses:
        for block in blocks[alias]:
            if not all(tokens_GLD.requires_grad for tokens_GLD in outputs[block]):
                raise UserError(
                    f"objectives.{alias}.weight: gradient_share is measured at the output of block "
                    f"{block}, which carries no gradient: train weights in block {block} or before "
                    "it, or give weight as a number"
                )
    needed = sorted({block for alias in losses for block in blocks[alias]})
    flow = _squares(flow_B, needed, outputs)
    squares = {}
    for alias, loss_B in losses.items():
        own = _squares(loss_B, blocks[alias], outputs)
        both = (torch.stack([side[block] for block in blocks[alias]]) for side in (flow, own))
        squares[alias] = torch.stack([of_blocks.sum() for of_blocks in both])
    return squares


def _squares(loss_B: Tensor, blocks: Sequence[int], outputs: Outputs) -> dict[int, Tensor]:
    """Squared norm of a loss's gradient at the output of each block."""
    totals = {block: outputs[block][0].new_zeros((), dtype=torch.float32) for block in blocks}
    if not loss_B.requires_grad:  # such as that of a batch without references
        return totals
    places = [(block, tokens_GLD) for block in blocks for tokens_GLD in outputs[block]]
    gradients = torch.autograd.grad(
        loss_B.sum(), [tokens_GLD for _, tokens_GLD in places], retain_graph=True, allow_unused=True
    )
    for (block, _), gradient_GLD in zip(places, gradients, strict=True):
        if gradient_GLD is not None:
            norm = torch.linalg.vector_norm(gradient_GLD, dtype=torch.float32)
            totals[block] = totals[block] + norm.square()
    return totals
