"""The parts of a pipeline folder: what they are loaded from, and what their numbers depend on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignlab.dataset_cache.key import Part
from alignlab.dataset_cache.model_parts import model_parts
from alignlab.errors import UserError
from alignlab.models.model_files import load_pretrained
from alignlab.models.weight_check import check_weights
from alignlab.runs.file_digests import check_unchanged, folder_digest

FROZEN = ("vae", "text_encoder", "tokenizer", "scheduler")
COMPONENTS = ("transformer", *FROZEN)
TEXT_PARTS = ("text_encoder", "tokenizer")
PART_FILES = ("json", "safetensors")
"""Endings of the files that a part is loaded from; a tokenizer has others as well."""


def part_endings(part: str) -> tuple[str, ...] | None:
    """Endings of the files that a part of a pipeline is loaded from; None: all are."""
    return None if part == "tokenizer" else PART_FILES


def encoder_parts(
    folder: Path, names: Sequence[str], dtype: torch.dtype, device: torch.device, *packages: str
) -> dict[str, Part]:
    """What an encoder's numbers depend on besides its input, for keys of the dataset cache.

    Args:
        folder: of the pipeline; its files are hashed, nothing is loaded.
        names: of the parts that encode.
        dtype: that they run in.
        device: that they run on.
        packages: whose code runs, besides torch, diffusers and transformers.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    digests: dict[str, Part] = {
        name: folder_digest(folder / name, part_endings(name)) for name in names
    }
    return digests | model_parts(dtype, device, "diffusers", "transformers", *packages)


def check_late_load(folder: Path, part: str, known: Mapping[str, Part] | None) -> None:
    """Refuses a part that was loaded just now from other files than keys of the cache name.

    Args:
        folder: of the pipeline.
        part: of it.
        known: what `encoder_parts` gave before; None: it was not asked.

    Raises:
        UserError: its files have changed.
    """
    if known is not None:
        check_unchanged(folder / part, part_endings(part), known[part])


def load_part(
    model_class: Any, folder: Path, part: str, *, setting: str = "model.path", **dtype: Any
) -> Any:
    """Loads one model and insists that no weight was left at its random initial value.

    Args:
        model_class: of diffusers or transformers.
        folder: of the pipeline.
        part: of it.
        setting: the recipe key that it came from, for messages.
        dtype: of the weights, as the class calls it.

    Raises:
        UserError: its files cannot be used.
    """
    model, info = load_pretrained(
        model_class,
        folder / part,
        setting=setting,
        use_safetensors=True,
        output_loading_info=True,
        **dtype,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{setting}: {folder / part} lacks {len(missing)} weights, e.g. {missing[0]}"
        )
    return model


def load_frozen(
    model_class: Any, folder: Path, part: str, *, setting: str = "model.path", **dtype: Any
) -> Any:
    """`load_part` of one that is not trained; its weights are checked."""
    model = load_part(model_class, folder, part, setting=setting, **dtype)
    check_part(folder, part, model, setting=setting)
    return model.requires_grad_(False).eval()


def check_part(folder: Path, part: str, model: nn.Module, *, setting: str = "model.path") -> None:
    """Refuses a part, or a half of the autoencoder, with weights not finite or all zero."""
    where = f"{setting}: {folder / part}"
    check_weights(where, model.named_parameters())
    for half, child in model.named_children():
        if half in ("encoder", "decoder"):
            check_weights(f"{where}, {half}", child.named_parameters())
