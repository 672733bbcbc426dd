"""The text encoder of a Wan pipeline.

Shape letters: B batch, L text tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import WanPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

MAX_TEXT_TOKENS = 512  # WanPipeline's max_sequence_length, and the length Wan was trained with


@dataclass(frozen=True)
class TextEncoder:
    """A frozen UMT5 encoder and its tokenizer.

    Args:
        model: on the device where texts are encoded.
        tokenizer: pads to `max_tokens`.
    """

    model: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return int(self.model.config.d_model)

    @property
    def max_tokens(self) -> int:
        """Length that prompts are padded to: the tokenizer's limit, at most Wan's 512."""
        return min(int(self.tokenizer.model_max_length), MAX_TEXT_TOKENS)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to fp32 embeddings (B, L, D), zero after each prompt's last token.

        This is WanPipeline's own encoding, one prompt at a time.
        """
        device = torch.device(self.model.device)
        with torch.autocast(device.type, enabled=False):
            rows = [
                self._pipeline.encode_prompt(
                    [prompt],
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.max_tokens,
                    device=device,
                )[0].float()
                for prompt in prompts
            ]
        return torch.cat(rows)

    @cached_property
    def _pipeline(self) -> WanPipeline:
        return WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.model,
            vae=None,
            scheduler=None,
            transformer=None,
        )
