"""The text encoder of a Wan pipeline.

Shape letters: B batch, L text tokens, D width.
"""

import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from alignlab.dataset_cache.key import Part
from alignlab.errors import UserError
from alignlab.models.late_model import LateModel
from alignlab.models.model_files import load_pretrained, read_object
from alignlab.models.pipeline_parts import TEXT_PARTS, check_late_load, encoder_parts, load_frozen
from alignlab.progress import tell_once, warn_once

SHOWN = 60  # characters of a caption in a message
TEXT_PACKAGES = ("ftfy", "tokenizers", "sentencepiece")  # between a text and its tokens
MAX_TEXT_TOKENS = 512  # WanPipeline's max_sequence_length, and the length Wan was trained with


@dataclass(frozen=True)
class TextEncoder:
    """A frozen UMT5 encoder and its tokenizer, each loaded when it is first needed.

    Args:
        folder: of the pipeline that both are of.
        dtype: of the weights.
        device: where texts are encoded.
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def parts(self) -> dict[str, Part]:
        """What embeddings depend on besides the text, for keys of the dataset cache."""
        return encoder_parts(self.folder, TEXT_PARTS, self.dtype, self.device, *TEXT_PACKAGES)

    @cached_property
    def late_model(self) -> LateModel[UMT5EncoderModel]:
        """The encoder, loaded when it is first used."""
        return LateModel(self._load_model, self.device)

    def load(self) -> None:
        """Loads encoder and tokenizer, if they are not loaded yet.

        Raises:
            UserError: files cannot be used, or have changed since `parts` named them.
        """
        self.late_model.loaded(), self.tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Pads to `max_tokens`; loaded now.

        Raises:
            UserError: its files cannot be used, or have changed since `parts` named them.
        """
        folder = self.folder / "tokenizer"
        loaded = load_pretrained(
            AutoTokenizer, folder, setting="model.path", config_file="tokenizer_config.json"
        )
        check_late_load(self.folder, "tokenizer", vars(self).get("parts"))
        assert isinstance(loaded, PreTrainedTokenizerBase)
        if loaded.pad_token is None:
            raise UserError(f"model.path: {folder} has no pad_token: fetch it again")
        return loaded

    @cached_property
    def dim(self) -> int:
        """Width of the embeddings."""
        config = self.folder / "text_encoder" / "config.json"
        return int(read_object(config, setting="model.path")["d_model"])

    @property
    def max_tokens(self) -> int:
        """Length that prompts are padded to: the tokenizer's limit, at most Wan's 512."""
        return min(int(self.tokenizer.model_max_length), MAX_TEXT_TOKENS)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to fp32 embeddings (B, L, D), zero after each prompt's last token.

        This is WanPipeline's own encoding, one prompt at a time.
        """
        device = self.device
        with self._on_device() as model, torch.autocast(device.type, enabled=False):
            pipeline = WanPipeline(  # not kept, so that the model can be freed
                tokenizer=self.tokenizer,
                text_encoder=model,
                vae=None,
                scheduler=None,
                transformer=None,
            )
            rows = [
                pipeline.encode_prompt(
                    [prompt],
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.max_tokens,
                    device=device,
                )[0].float()
                for prompt in prompts
            ]
        return torch.cat(rows)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that have more than `max_tokens` tokens: `encode` cuts them."""
        return [prompt for prompt in prompts if self._is_cut(prompt_clean(prompt))]

    def _is_cut(self, prompt: str) -> bool:
        # a token is a byte or more of the normalised text; one more may begin and one end it
        normalised = unicodedata.normalize("NFKC", prompt)
        if len(normalised.encode(errors="replace")) + 2 <= self.max_tokens:
            return False
        return len(self.tokenizer(prompt, verbose=False).input_ids) > self.max_tokens

    @contextmanager
    def _on_device(self) -> Iterator[UMT5EncoderModel]:
        with self.late_model.in_use() as model:
            yield model

    def _load_model(self) -> UMT5EncoderModel:
        if self.late_model.num_loads:
            tell_once(
                "the text encoder is loaded again, for texts that the dataset cache does not have "
                "yet, such as those of the next run"
            )
        model: UMT5EncoderModel = load_frozen(
            UMT5EncoderModel, self.folder, "text_encoder", dtype=self.dtype
        )
        check_late_load(self.folder, "text_encoder", vars(self).get("parts"))
        return model


def cut_captions(encoder: TextEncoder, captions: Sequence[str]) -> tuple[str, ...]:
    """A warning, its numbers in brackets at the end, if the encoder cuts any of the captions."""
    cut = encoder.cut(captions)
    if not cut:
        return ()
    beginning = textwrap.shorten(cut[0], SHOWN, placeholder="...")
    return (
        f"captions are cut at {encoder.max_tokens} tokens, the text encoder's limit: shorten them; "
        f"the first begins {beginning!r} [{len(cut)} of {len(captions)}]",
    )


def warn_of_cut(encoder: TextEncoder, texts: Mapping[str, str]) -> None:
    """Warns of the texts that the encoder cuts, by the name of what set them."""
    for setting, text in texts.items():
        if encoder.cut([text]):
            limit = encoder.max_tokens
            warn_once(f"{setting} is cut at {limit} tokens, the text encoder's limit: shorten it")
