"""Embeddings of texts through the dataset cache.

Shape letters: L text tokens, D width.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from alignlab.dataset_cache.clip_keys import text_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.errors import shown
from alignlab.models.text_encoder import TextEncoder
from alignlab.progress import step_progress

TEXT = "caption by text_encoder"


def kept_text(
    values: EncodedValues,
    encoder: TextEncoder,
    text: str,
    where: str | None = None,
) -> Tensor:
    """The fp32 embedding of a text, (L, D) on the CPU, zero after its last token.

    Args:
        values: where it is kept.
        encoder: makes it.
        text: any text.
        where: what has it, for the message; None: the text itself says it.

    Raises:
        UserError: the embedding is not finite.
    """

    def make() -> dict[str, Tensor]:
        return _trimmed(encoder.encode([text])[0].cpu())

    def refusal() -> str:
        return not_finite(where or f"the text {shown(text)}", TEXT, encoder.folder)

    return _padded(values.get("text", lambda: text_key(text, encoder.parts), make, refusal))


def encode_ahead(values: EncodedValues, encoder: TextEncoder, texts: Mapping[str, str]) -> None:
    """Has texts on the disk, as `encode_missing`, and frees the encoder once all are there."""
    encode_missing(values, encoder, texts)
    if values.keeps("text") and not _lacking(values, encoder, texts):
        encoder.late_model.free()


def encode_missing(values: EncodedValues, encoder: TextEncoder, texts: Mapping[str, str]) -> None:
    """Encodes texts that are not in the dataset cache, and returns when they are on the disk.

    Where what is new is not kept, each is encoded when it is read, and nothing is done here. A disk
    that takes no more keeps none.

    Args:
        values: where they are kept.
        encoder: makes them.
        texts: each with what has it, for messages.

    Raises:
        UserError: as `kept_text`.
    """
    missing = _lacking(values, encoder, texts)
    if not missing or values.cache.mode != "write":
        return
    with step_progress("texts", total=len(missing)) as advance:
        for done, text in enumerate(missing, start=1):
            kept_text(values, encoder, text, texts[text])
            advance(done, "")
    values.flush()


def _lacking(values: EncodedValues, encoder: TextEncoder, texts: Mapping[str, str]) -> list[str]:
    if not values.keeps("text"):
        return []
    return [text for text in texts if values.lacks(text_key(text, encoder.parts))]


def not_finite(where: str, what: str, folder: Path) -> str:
    """The message about what an encoder of the pipeline in a folder made."""
    return (
        f"{where}: encoding its {what} gives values that are not finite: "
        f"look at {folder} (model.path), or try model.precision=fp32"
    )


def _trimmed(text_LD: Tensor) -> dict[str, Tensor]:
    """An embedding without the zeros after its last token, with its length."""
    is_used_L = (text_LD.view(torch.int32) != 0).any(1)  # as bits: -0 would not come back
    used = int(is_used_L.nonzero().max()) + 1 if is_used_L.any() else 0
    return {"text_LD": text_LD[:used], "length": torch.tensor(len(text_LD))}


def _padded(values: Mapping[str, Tensor]) -> Tensor:
    text_LD = values["text_LD"]
    unused = int(values["length"]) - len(text_LD)
    return torch.cat([text_LD, text_LD.new_zeros(unused, text_LD.shape[1])])
