"""What objectives by the cosine of matching tokens share: two settings, and what the log gets.

Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width; `...` any leading
dimensions.
"""

from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from alignlab.kernels.cosine import accumulation_dtype, paired_cosine


def centered(tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """Subtracts the mean over a sample's tokens, which gets no gradient.

    Args:
        tokens: (..., N, D).
        valid: which tokens count in the mean, bool (..., N), broadcastable; None: all.

    Returns:
        (..., N, D) in float32 (float64 from float64).
    """
    tokens = tokens.to(accumulation_dtype(tokens))
    fixed = tokens.detach()
    if valid is None:
        return tokens - fixed.mean(-2, keepdim=True)
    count = valid.sum(-1)[..., None, None].clamp_min(1)
    return tokens - (fixed * valid[..., None]).sum(-2, keepdim=True) / count


def _bounded(centered_BND: Tensor, tokens_BND: Tensor) -> Tensor:
    """The same numbers, whose gradient is scaled by how much of a token's length is left of it.

    The gradient of a cosine goes with one over a vector's length, and of a token near the mean
    hardly any is left: at high noise, where the tokens of a sample are alike, the gradient has no
    bound. Measured from scratch (`findings/centred`): a norm of 1,000 in place of 0.3, which was
    clipped to 1, and a flow loss that stood still; bounded at a fifth of the length it stood still
    as well. So it is no larger than that of a cosine of tokens that are not centred.
    """
    left_BN1 = centered_BND.norm(dim=-1, keepdim=True)
    length_BN1 = tokens_BND.norm(dim=-1, keepdim=True).to(left_BN1.dtype)
    share_BN1 = (left_BN1 / length_BN1.clamp_min(torch.finfo(left_BN1.dtype).tiny)).clamp_max(1.0)
    moving_BND = centered_BND * share_BN1.detach()
    bounded_BND: Tensor = moving_BND + (centered_BND - moving_BND).detach()
    return bounded_BND


def frame_differences(tokens_BTPD: Tensor) -> Tensor:
    """Subtracts each frame from the next, (B, T-1, P, D) in float32 (float64 from float64).

    Raises:
        ValueError: there is one frame.
    """
    if tokens_BTPD.shape[1] < 2:
        raise ValueError("temporal_difference compares a frame with the next, and there is one")
    tokens_BTPD = tokens_BTPD.to(accumulation_dtype(tokens_BTPD))
    return tokens_BTPD[:, 1:] - tokens_BTPD[:, :-1]


class TokenCosineSettings(BaseModel):
    """Settings of objectives by the cosine of matching video tokens.

    Args:
        centered: each side minus its mean over all tokens of the sample, without gradient, before
            the cosine: what all tokens have in common then gives no agreement. The gradient is
            scaled by the share of a token's length that is left of it, or it has no bound.
        temporal_difference: compare not tokens but how each changes to the next frame. Not with
            `centered`: what all frames have in common is in no difference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    centered: bool = False
    temporal_difference: bool = False

    @model_validator(mode="after")
    def _differences_are_not_centered(self) -> Self:
        if self.centered and self.temporal_difference:
            raise ValueError(
                "centered: what all frames have in common is in no temporal_difference; remove one"
            )
        return self

    def compared(self, tokens_BTPD: Tensor) -> Tensor:
        """What the cosine takes of one side, (B, T or T-1, P, D); by default the tokens.

        Raises:
            ValueError: differences of one frame.
        """
        if self.temporal_difference:
            return frame_differences(tokens_BTPD)
        if self.centered:
            tokens_BND = tokens_BTPD.flatten(1, 2)
            left_BND = centered(tokens_BND)
            if left_BND.requires_grad:
                left_BND = _bounded(left_BND, tokens_BND.detach())
            return left_BND.view(tokens_BTPD.shape)
        return tokens_BTPD


@torch.no_grad()
def logged_cosines(student_BTPD: Tensor, teacher_BTPD: Tensor) -> Tensor:
    """Mean cosines of matching tokens, as they are and centred, (2, B), whatever is trained."""
    sides = student_BTPD.flatten(1, 2), teacher_BTPD.flatten(1, 2)
    return torch.stack(
        [paired_cosine(*sides).mean(-1), paired_cosine(*map(centered, sides)).mean(-1)]
    )
