"""The parts of a pipeline folder: what they are loaded from, and what their numbers depend on."""

from collections.abc import Sequence
from pathlib import Path

import torch

from alignlab.dataset_cache.key import Part
from alignlab.dataset_cache.model_parts import model_parts
from alignlab.runs.file_digests import combined, digest_folder

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_PARTS = ("text_encoder", "tokenizer")
PART_FILES = ("json", "safetensors")
"""Endings of the files that a part is loaded from; a tokenizer has others as well."""


def part_endings(part: str) -> tuple[str, ...] | None:
    """Endings of the files that a part of a pipeline is loaded from; None: all are."""
    return None if part == "tokenizer" else PART_FILES


def encoder_parts(
    folder: Path, names: Sequence[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Part]:
    """What an encoder's numbers depend on besides its input, for keys of the dataset cache.

    Args:
        folder: of the pipeline; its files are hashed, nothing is loaded.
        names: of the parts that encode.
        dtype: that they run in.
        device: that they run on.
    """
    digests: dict[str, Part] = {
        name: combined(digest_folder(folder / name, part_endings(name))) for name in names
    }
    return digests | model_parts(dtype, device, "diffusers", "transformers")
