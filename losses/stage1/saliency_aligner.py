"""SARA's Stage 1 aligner (arXiv 2605.07800): where in a clip is what a text names?

Trained once on frozen teacher tokens and frozen text embeddings (`alignlab stage1 sara`), then
frozen inside the Stage 2 objective.
Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, L text tokens, D width of
the teacher, E width of the space in which clips and texts are compared, H heads.
"""

from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.kernels.cosine import accumulation_dtype
from alignlab.losses.projector import draw_initial_weights

MLP_RATIO = 4


def saliency_bce(
    logits_BTP: Tensor, target_BTP: Tensor, counted_BTP: Tensor | None = None
) -> Tensor:
    """Computes the mean binary cross-entropy over a sample's tokens, (B,).

    Computed in float32 (float64 from float64) whatever the input dtype.

    Args:
        logits_BTP: saliency before its sigmoid.
        target_BTP: 1 where the token shows what the text names, else 0; values between count.
        counted_BTP: bool, tokens that the mean is over; None: all. 0 for a sample without any.

    Raises:
        ValueError: the shapes differ.
    """
    if logits_BTP.shape != target_BTP.shape:
        raise ValueError(
            f"logits {tuple(logits_BTP.shape)} and target {tuple(target_BTP.shape)} differ"
        )
    dtype = accumulation_dtype(logits_BTP)
    logits_BN, target_BN = logits_BTP.to(dtype).flatten(1), target_BTP.to(dtype).flatten(1)
    bce_BN = F.binary_cross_entropy_with_logits(logits_BN, target_BN, reduction="none")
    if counted_BTP is None:
        return bce_BN.mean(1)
    if counted_BTP.shape != target_BTP.shape:
        raise ValueError(
            f"counted {tuple(counted_BTP.shape)} and target {tuple(target_BTP.shape)} differ"
        )
    counted_BN = counted_BTP.flatten(1)
    return torch.where(counted_BN, bce_BN, 0.0).sum(1) / counted_BN.sum(1).clamp(min=1)


class SaliencyAlignerConfig(BaseModel):
    """Shape of a saliency aligner.

    Args:
        teacher_dim: width D of the teacher's tokens, and of the blocks (paper).
        text_dim: width of the text embeddings.
        depth_cross: blocks in which visual tokens attend to the text, 2 (paper). They come first
            (ours; the paper does not give the order).
        depth_self: blocks in which visual tokens attend to each other, 4 (paper).
        heads: attention heads, 8 (paper); divides `teacher_dim`.
        hidden: hidden width of the saliency head, 512 (paper).
        embed_dim: width E of the space of the contrastive loss, 512 (ours).
        attention: what a self-attention block sees: all tokens of the clip, T*P (ours: the paper
            runs on 16 x 576), or those of one frame. `frame` costs T times less and is the choice
            for an image teacher on long clips, such as 81 x 1560.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_dim: int = Field(ge=1)
    text_dim: int = Field(ge=1)
    depth_cross: int = Field(default=2, ge=1)
    depth_self: int = Field(default=4, ge=0)
    heads: int = Field(default=8, ge=1)
    hidden: int = Field(default=512, ge=1)
    embed_dim: int = Field(default=512, ge=1)
    attention: Literal["clip", "frame"] = "clip"

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.teacher_dim % self.heads:
            raise ValueError(
                f"heads: {self.heads} does not divide the teacher's width {self.teacher_dim}"
            )
        return self


class AlignerOutput(NamedTuple):
    """What the aligner says of a clip and a text.

    Args:
        logits_BTP: saliency before its sigmoid.
        visual_BTPD: the tokens behind it, which have seen the text.
    """

    logits_BTP: Tensor
    visual_BTPD: Tensor


class SaliencyAligner(nn.Module):
    """Cross-attention to a text, self-attention, a saliency head and a contrastive head.

    There is no position embedding (paper), so any grid (T, H, W) can be asked for; places are
    known from the teacher's tokens alone. Where the paper pools both sides with a language model,
    ours takes means: of visual tokens, weighted by their saliency, and of text tokens. Ours too
    are the pre-norm blocks and the norm before both heads.

    Args:
        config: see `SaliencyAlignerConfig`.
        seed: of the initial weights.
    """

    def __init__(self, config: SaliencyAlignerConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        width = config.teacher_dim
        with torch.device("meta"):
            self.text_norm = nn.RMSNorm(config.text_dim)
            self.cross_blocks = nn.ModuleList(
                Block(width, config.text_dim, config.heads) for _ in range(config.depth_cross)
            )
            self.self_blocks = nn.ModuleList(
                Block(width, width, config.heads) for _ in range(config.depth_self)
            )
            self.visual_norm = nn.LayerNorm(width)
            self.saliency_head = nn.Sequential(
                nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1)
            )
            self.visual_embed = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, config.embed_dim))
            self.text_embed = nn.Linear(config.text_dim, config.embed_dim)
        draw_initial_weights(self, seed)

    def forward(self, teacher_BTPD: Tensor, text_BLD: Tensor) -> AlignerOutput:
        """Computes the saliency of every token for one text per clip, before its sigmoid.

        Args:
            teacher_BTPD: the teacher's tokens.
            text_BLD: embeddings of a text, zeros after its last token; zero rows are not attended
                to. A text without any token is answered from the clip alone.
        """
        dtype = self.text_embed.weight.dtype
        batch, frames, tokens, _ = teacher_BTPD.shape
        x_BND = teacher_BTPD.to(dtype).flatten(1, 2)
        text_BLD = text_BLD.to(dtype)
        keys_BLD, words_BL = self.text_norm(text_BLD), _is_word(text_BLD)
        for block in self.cross_blocks:
            x_BND = block(x_BND, keys_BLD, words_BL)
        if self.config.attention == "frame":
            x_BND = x_BND.reshape(batch * frames, tokens, -1)
        for block in self.self_blocks:
            x_BND = block(x_BND)
        visual_BTPD = self.visual_norm(x_BND).reshape(batch, frames, tokens, -1)
        return AlignerOutput(self.saliency_head(visual_BTPD).squeeze(-1), visual_BTPD)

    def saliency(self, teacher_BTPD: Tensor, text_BLD: Tensor) -> Tensor:
        """Computes how much each token shows what the text names: (B, T, P) in [0, 1]."""
        output: AlignerOutput = self(teacher_BTPD, text_BLD)
        return output.logits_BTP.sigmoid()

    def embed(self, output: AlignerOutput, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Pools both sides for the contrastive loss: visual (B, E) and text (B, E).

        The saliency that weights the visual mean gets no gradient from here, as in the paper,
        where the saliency head is trained by its masks alone.
        """
        weight_BTP = output.logits_BTP.detach().sigmoid()
        weight_BTP = weight_BTP / weight_BTP.sum((1, 2), keepdim=True)
        visual_BD = (weight_BTP[..., None] * output.visual_BTPD).sum((1, 2))
        text_BLD = text_BLD.to(self.text_embed.weight.dtype)
        words_BL = _is_word(text_BLD)
        # zero rows add nothing to the sum
        text_BD = self.text_norm(text_BLD).sum(1) / words_BL.sum(1, keepdim=True).clamp(min=1)
        return self.visual_embed(visual_BD), self.text_embed(text_BD)


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals.

    Args:
        width: of the tokens.
        context_dim: of what they attend to; equal to `width` for self-attention.
        heads: divides `width`.
    """

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_dim, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, MLP_RATIO * width),
            nn.GELU(),
            nn.Linear(MLP_RATIO * width, width),
        )

    def forward(
        self, x_BND: Tensor, context_BLD: Tensor | None = None, seen_BL: Tensor | None = None
    ) -> Tensor:
        """Attends to `context_BLD` where `seen_BL` is true, or to the tokens themselves."""
        normed_BND = self.norm(x_BND)
        key, value = self.key_value(normed_BND if context_BLD is None else context_BLD).chunk(2, -1)
        attended_BHND = F.scaled_dot_product_attention(
            self._split(self.query(normed_BND)),
            self._split(key),
            self._split(value),
            attn_mask=None if seen_BL is None else seen_BL[:, None, None, :],
        )
        x_BND = x_BND + self.out(attended_BHND.transpose(1, 2).flatten(2))
        x_BND = x_BND + self.mlp(x_BND)
        return x_BND

    def _split(self, x_BND: Tensor) -> Tensor:
        batch, tokens, _ = x_BND.shape
        return x_BND.reshape(batch, tokens, self.heads, -1).transpose(1, 2)


def _is_word(text_BLD: Tensor) -> Tensor:
    """Which rows are tokens of the text, (B, L): a padding row is all zeros."""
    return (text_BLD != 0).any(-1)
