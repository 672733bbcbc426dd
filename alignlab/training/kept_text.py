"""Embeddings of texts through the dataset cache.

Shape letters: L text tokens, D width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from alignlab.dataset_cache.clip_keys import text_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.models.text_encoder import TextEncoder


def kept_text(
    values: EncodedValues,
    encoder: TextEncoder,
    text: str,
    check: Callable[[Tensor], None] = lambda text_LD: None,
) -> Tensor:
    """The fp32 embedding of a text, (L, D) on the CPU, zero after its last token.

    Args:
        values: where it is kept.
        encoder: makes it.
        text: any text.
        check: refuses an embedding that is not to be kept.
    """

    def make() -> dict[str, Tensor]:
        text_LD = encoder.encode([text])[0].cpu()
        check(text_LD)
        return _trimmed(text_LD)

    return _padded(values.get("text", lambda: text_key(text, encoder.parts), make))


def _trimmed(text_LD: Tensor) -> dict[str, Tensor]:
    """An embedding without the zeros after its last token, with its length."""
    is_used_L = (text_LD.view(torch.int32) != 0).any(1)  # as bits: -0 would not come back
    used = int(is_used_L.nonzero().max()) + 1 if is_used_L.any() else 0
    return {"text_LD": text_LD[:used], "length": torch.tensor(len(text_LD))}


def _padded(values: Mapping[str, Tensor]) -> Tensor:
    text_LD = values["text_LD"]
    unused = int(values["length"]) - len(text_LD)
    return torch.cat([text_LD, text_LD.new_zeros(unused, text_LD.shape[1])])
