"""A Wan text-to-video model, loaded from a diffusers pipeline folder.

Shape letters: B batch, C channels, T frames, H height, W width, L text tokens, D width.
`T`, `H`, `W` count pixels for uint8 tensors and latent cells for latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from alignlab.config.parts import Init, LoraConfig, TextEncoderPlace
from alignlab.errors import UserError
from alignlab.losses.objective import Grid
from alignlab.models.attention_backends import check_backend
from alignlab.models.frozen_parts import FrozenParts
from alignlab.models.lora import add_lora
from alignlab.models.model_files import (
    check_model_files,
    construct,
    local_folder,
    read_object,
)
from alignlab.models.pipeline_parts import (
    COMPONENTS,
    PART_FILES,
    TEXT_PARTS,
    check_part,
    load_part,
)
from alignlab.models.text_encoder import TextEncoder
from alignlab.randomness import global_draws


@dataclass(frozen=True)
class Wan:
    """The parts of a Wan pipeline; everything but the transformer is frozen.

    Args:
        transformer: what is trained; fp32 weights, or a frozen base with a fp32 LoRA.
        frozen: autoencoder and text encoder, loaded when they are needed.
    """

    transformer: WanTransformer3DModel
    frozen: FrozenParts

    @property
    def folder(self) -> Path:
        """Where the parts came from; an export copies the frozen ones from here."""
        return self.frozen.folder

    @property
    def device(self) -> torch.device:
        return self.frozen.device

    @property
    def vae(self) -> AutoencoderKLWan:
        """The autoencoder, in fp32."""
        return self.frozen.vae

    @property
    def text(self) -> TextEncoder:
        """The frozen text encoder with its tokenizer."""
        return self.frozen.text

    @property
    def text_encoder(self) -> UMT5EncoderModel:
        """The text encoder's model, in the recipe's precision."""
        return self.frozen.text.late_model.loaded()

    @property
    def num_blocks(self) -> int:
        return int(self.transformer.config["num_layers"])

    @property
    def student_dim(self) -> int:
        """Width of the tokens that a tap captures."""
        config = self.transformer.config
        return int(config["num_attention_heads"] * config["attention_head_dim"])

    def latent_grid(self, frames: int, height: int, width: int) -> Grid:
        """The video token grid (T, H, W) of a clip of so many frames and pixels.

        Raises:
            UserError: the clip does not fit the strides of the autoencoder and the patches.
        """
        patch = self.transformer.config["patch_size"]
        return self.frozen.token_grid(patch, frames, height, width)

    def encode_video(self, video_THWC: Tensor) -> Tensor:
        """uint8 frames to latents: see `FrozenParts`, here and below."""
        return self.frozen.encode_video(video_THWC)

    def encode_image(self, image_HWC: Tensor) -> Tensor:
        """A uint8 image to latents."""
        return self.frozen.encode_image(image_HWC)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to embeddings."""
        return self.frozen.encode_text(prompts)

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Latents to uint8 frames."""
        return self.frozen.decode(latents_CTHW)


def load_wan(
    path: str,
    *,
    train: Literal["full", "lora"] = "full",
    lora: LoraConfig | None = None,
    attention: str = "native",
    gradient_checkpointing: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    seed: int = 0,
    init: Init = "trained",
    text_encoder: TextEncoderPlace = "auto",
    parks_vae: bool = False,
    frozen: FrozenParts | None = None,
    load_frozen: bool = True,
) -> Wan:
    """Loads a diffusers Wan pipeline for training.

    Args:
        path: pipeline folder (laid out as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`) or hub id.
        train: `full` trains every weight of the transformer, kept in fp32 (run it under autocast
            for bf16); `lora` freezes it and trains an adapter.
        lora: the adapter; needed by `lora`, refused by `full`.
        attention: any diffusers attention backend that can train a Wan block on `device`.
        gradient_checkpointing: recompute each block in the backward pass.
        precision: of the frozen weights: the text encoder and, with `lora`, the transformer.
        device: where everything goes.
        seed: of the adapter's initial weights, and of random ones.
        init: `random` reads the transformer's config.json alone and draws its weights.
        text_encoder, parks_vae: see `FrozenParts`.
        frozen: autoencoder and text encoder of an earlier model: taken if they are the same.
        load_frozen: load both now; else when they are first needed.

    Raises:
        UserError: the folder, the hub id, a LoRA target or the backend cannot be used.
    """
    if (lora is None) != (train == "full"):
        raise ValueError(f"train={train!r} and lora={lora!r} do not go together")
    folder = checked_pipeline(path)
    dtype = torch.bfloat16 if precision == "bf16" and train == "lora" else torch.float32
    transformer = _drawn(folder, seed) if init == "random" else _load_transformer(folder, dtype)
    check_backend(
        attention,
        device,
        precision=precision,
        train=train,
        gradient_checkpointing=gradient_checkpointing,
        head_dim=transformer.config["attention_head_dim"],
    )
    places: dict[str, Any] = {"text_encoder": text_encoder, "parks_vae": parks_vae}
    own = frozen_parts(folder, precision=precision, device=device, **places)
    frozen = frozen if frozen is not None and frozen.is_same(own) else own
    _check_text_to_video(transformer, frozen, path)
    if load_frozen:
        frozen.load()
    _prepare(transformer, lora, seed, attention, gradient_checkpointing)
    return Wan(transformer.to(device).train(), frozen)


def _prepare(
    transformer: WanTransformer3DModel,
    lora: LoraConfig | None,
    seed: int,
    attention: str,
    gradient_checkpointing: bool,
) -> None:
    """See `load_wan`."""
    if lora is not None:
        add_lora(transformer, lora, seed=seed)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.set_attention_backend(attention)


def _load_transformer(folder: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    transformer: WanTransformer3DModel = load_part(
        WanTransformer3DModel, folder, "transformer", torch_dtype=dtype
    )
    check_part(folder, "transformer", transformer)
    return transformer


def _drawn(folder: Path, seed: int) -> WanTransformer3DModel:
    """The folder's architecture with diffusers' initial weights, fp32.

    They are drawn on the CPU from `seed` alone, whatever else is drawn and whatever device trains
    them: the variants of a comparison start from equal ones, and so do the ranks of a run.
    """
    with global_draws(seed, "transformer"):
        transformer: WanTransformer3DModel = construct(
            WanTransformer3DModel, folder / "transformer", setting="model.path"
        )
    return transformer


def frozen_parts(
    folder: Path,
    *,
    precision: Literal["fp32", "bf16"],
    device: torch.device | str,
    text_encoder: TextEncoderPlace = "auto",
    parks_vae: bool = False,
) -> FrozenParts:
    """The frozen encoders of a pipeline folder; nothing is loaded yet.

    Args:
        folder: see `checked_pipeline`.
        precision: of the text encoder.
        device: where they run.
        text_encoder, parks_vae: see `FrozenParts`.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return FrozenParts(folder, dtype, torch.device(device), text_encoder, parks_vae)


def pipeline_folder(path: str, parts: Sequence[str] = COMPONENTS) -> Path:
    """The folder of a pipeline, whose `parts` and tokenizer are fetched if it is on the hub only.

    Raises:
        UserError: the folder or the hub id cannot be used.
    """
    patterns = ["model_index.json", "tokenizer/*"]
    # no other kind of file of a part, so that no pickle is loaded
    patterns += [f"{part}/*.{ending}" for part in parts for ending in PART_FILES]
    return local_folder(path, setting="model.path", marker="model_index.json", patterns=patterns)


def load_text_encoder(
    path: str,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    load: bool = True,
) -> TextEncoder:
    """The text encoder of a diffusers Wan pipeline and nothing else of it.

    Args:
        path: pipeline folder, shipped asset or hub id.
        precision: of its weights.
        device: where it goes.
        load: now; else when it is first used.

    Raises:
        UserError: the folder or the hub id cannot be used.
    """
    folder = pipeline_folder(path, TEXT_PARTS[:1])
    for part in TEXT_PARTS:
        if not (folder / part).is_dir():
            raise UserError(f"model.path: {folder} has no {part}/ folder")
    encoder = frozen_parts(folder, precision=precision, device=device).text
    if load:
        encoder.load()
    return encoder


def checked_pipeline(path: str) -> Path:
    """`pipeline_folder` of a pipeline with one transformer and a scheduler of diffusers.

    Raises:
        UserError: it is no such pipeline, or a file of it is damaged.
    """
    folder = pipeline_folder(path)
    index = read_object(folder / "model_index.json", setting="model.path")
    absent = [part for part in COMPONENTS if not (folder / part).is_dir()]
    if absent:
        raise UserError(f"model.path: {folder} has no {absent[0]}/ folder")
    for part in COMPONENTS:  # also the scheduler, which an export copies
        check_model_files(folder / part, setting="model.path")
    read_object(folder / "scheduler" / "scheduler_config.json", setting="model.path")
    if _class_name(index, "transformer_2") is not None:
        raise UserError(
            f"model.path: {folder} holds two transformers (Wan 2.2 experts); only pipelines "
            "with one are supported"
        )
    name = str(_class_name(index, "scheduler"))
    if not hasattr(diffusers, name):
        raise UserError(f"model.path: {folder / 'model_index.json'}: unknown scheduler {name}")
    return folder


def _class_name(index: Mapping[str, Any], part: str) -> Any:
    """The class that a `model_index.json` has for a part; None where it has none."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _check_text_to_video(
    transformer: WanTransformer3DModel, frozen: FrozenParts, path: str
) -> None:
    inputs, latents = transformer.config["in_channels"], frozen.vae_config["z_dim"]
    if inputs != latents:
        raise UserError(
            f"model.path: {path} is no text-to-video model: its transformer takes {inputs} "
            f"channels, its autoencoder gives {latents}"
        )
