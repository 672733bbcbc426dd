"""Attention of Wan's blocks: one dtype for every backend, and text for the video's tokens alone.

Shape letters: B batch, N tokens, L text tokens, D width, H heads, E width of a head.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor


class SameDtypeAttention(WanAttnProcessor):
    """diffusers' Wan attention, with queries and keys in the dtype of the values.

    CUDA's autocast computes `norm_q` and `norm_k` in fp32 and `to_v` in bf16. It then casts the
    inputs of torch's own attention; xformers, flash-attn and SageAttention get them as they are,
    and raise. Here every backend gets what autocast gives torch's own: queries and keys cast to
    bf16 after the rotary embedding, where Wan's code casts them too. All else is as in diffusers.

    Takes no image embeddings (image-to-video) and no fused projections.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention (B, N, D) -> (B, N, D), or cross-attention to (B, L, D)."""
        joint = encoder_hidden_states is None
        context = hidden_states if joint else encoder_hidden_states
        query_BNHE = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key_BNHE = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        value_BNHE = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query_BNHE = rotate(query_BNHE, *rotary_emb)
            key_BNHE = rotate(key_BNHE, *rotary_emb)
        out_BNHE = dispatch_attention_fn(
            query_BNHE.type_as(value_BNHE),
            key_BNHE.type_as(value_BNHE),
            value_BNHE,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config if joint else None,
        )
        projection, dropout = attn.to_out
        out_BND: Tensor = dropout(projection(out_BNHE.flatten(2, 3).type_as(value_BNHE)))
        return out_BND


class VideoTextAttention(SameDtypeAttention):
    """Text cross-attention of the first `num_video_tokens` tokens; zero for the others.

    The reference tokens' part is not computed, as in RefAlign's code.
    """

    num_video_tokens = 0

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `SameDtypeAttention`, for the video's tokens."""
        video_BND = hidden_states[:, : self.num_video_tokens]
        out_BND = super().__call__(
            attn, video_BND, encoder_hidden_states, attention_mask, rotary_emb
        )
        return F.pad(out_BND, (0, 0, 0, hidden_states.shape[1] - self.num_video_tokens))


def rotate(tokens_BNHE: Tensor, cos_1N1E: Tensor, sin_1N1E: Tensor) -> Tensor:
    """Rotary position embedding: turns each pair of neighbouring channels by its angle.

    In the tables' fp32 and then in the tokens' dtype. The tables say each angle twice.
    """
    cos, sin = cos_1N1E[..., ::2], sin_1N1E[..., ::2]
    real, imaginary = tokens_BNHE.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).type_as(tokens_BNHE)
