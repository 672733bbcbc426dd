"""A Wan text-to-video model, loaded from a diffusers pipeline folder.

Shape letters: B batch, C channels, T frames, H height, W width, L text tokens, D width.
`T`, `H`, `W` count pixels for uint8 tensors and latent cells for latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from alignlab.config.parts import LoraConfig
from alignlab.dataset_cache.key import Part
from alignlab.errors import UserError
from alignlab.losses.objective import Grid
from alignlab.models.attention_backends import check_backend
from alignlab.models.lora import add_lora
from alignlab.models.model_files import (
    check_model_files,
    load_pretrained,
    local_folder,
    read_object,
)
from alignlab.models.pipeline_parts import COMPONENTS, PART_FILES, TEXT_PARTS, encoder_parts
from alignlab.models.text_encoder import TextEncoder
from alignlab.models.weight_check import check_weights


@dataclass(frozen=True)
class Wan:
    """The parts of a Wan pipeline; everything but the transformer is frozen.

    Args:
        transformer: what is trained; fp32 weights, or a frozen base with a fp32 LoRA.
        vae: fp32, because Wan's autoencoder loses detail in bf16 (diffusers' own advice).
        text_encoder: in the recipe's precision.
        tokenizer: of the text encoder.
        folder: where the parts came from; an export copies the frozen ones from here.
    """

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    @property
    def device(self) -> torch.device:
        return torch.device(self.vae.device)

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
        patch_t, patch_h, patch_w = self.transformer.config["patch_size"]
        stride_t = self.vae.config["scale_factor_temporal"]
        stride = self.vae.config["scale_factor_spatial"]
        if (frames - 1) % stride_t:
            raise UserError(f"data.frames: {frames} is not a multiple of {stride_t} plus 1")
        if height % (stride * patch_h) or width % (stride * patch_w):
            raise UserError(
                f"data.size: {height}x{width} is not a multiple of "
                f"{stride * patch_h}x{stride * patch_w} (autoencoder stride times patch)"
            )
        latent_frames = 1 + (frames - 1) // stride_t
        return (
            latent_frames // patch_t,
            height // (stride * patch_h),
            width // (stride * patch_w),
        )

    @torch.no_grad()
    def encode_video(self, video_THWC: Tensor) -> Tensor:
        """uint8 frames to normalised fp32 latents (C, T, H, W).

        Takes the mode of the posterior, so that the same clip always has the same latents, and
        normalises with the autoencoder's `latents_mean` and `latents_std` as WanPipeline does.
        """
        pixels = video_THWC.to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        with torch.autocast(self.device.type, enabled=False):
            latents_BCTHW: Tensor = self.vae.encode(pixels).latent_dist.mode()
        mean, std = self._latent_statistics
        return ((latents_BCTHW - mean) / std)[0]

    def encode_image(self, image_HWC: Tensor) -> Tensor:
        """One uint8 reference image to normalised fp32 latents (C, H, W).

        References are encoded one at a time, each as a clip of one frame (RefAlign's code).
        """
        return self.encode_video(image_HWC[None])[:, 0]

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Normalised latents to uint8 frames (T, H, W, C).

        Raises:
            UserError: latents or pixels are not finite, which uint8 cannot show.
        """
        mean, std = self._latent_statistics
        with torch.autocast(self.device.type, enabled=False):
            latents_BCTHW = latents_CTHW.to(self.device).float()[None] * std + mean
            pixels: Tensor = self.vae.decode(latents_BCTHW, return_dict=False)[0][0]
        if not pixels.isfinite().all():
            if not latents_CTHW.isfinite().all():
                raise UserError(
                    "the latents of a generated clip are not finite: the trained weights give no "
                    "clips; lower optim.lr, and train under another name"
                )
            raise UserError(
                f"model.path: the decoder of {self.folder / 'vae'} gives pixels that are not finite"
            )
        frames = ((pixels + 1.0) * 127.5).round().clamp(0, 255)
        return frames.to(torch.uint8).permute(1, 2, 3, 0)

    @cached_property
    def vae_parts(self) -> dict[str, Part]:
        """What latents depend on besides the pixels, for keys of the dataset cache."""
        return encoder_parts(self.folder, ("vae",), torch.float32, self.device)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to fp32 embeddings (B, L, D), zero after each prompt's last token."""
        return self.text.encode(prompts)

    @cached_property
    def text(self) -> TextEncoder:
        """The frozen text encoder with its tokenizer."""
        return TextEncoder(self.text_encoder, self.tokenizer, self.folder)

    @cached_property
    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        config, shape = self.vae.config, (1, -1, 1, 1, 1)
        mean = torch.tensor(config["latents_mean"], device=self.device).view(shape)
        return mean, torch.tensor(config["latents_std"], device=self.device).view(shape)


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
        seed: of the adapter's initial weights.

    Raises:
        UserError: the folder, the hub id, a LoRA target or the backend cannot be used.
    """
    if (lora is None) != (train == "full"):
        raise ValueError(f"train={train!r} and lora={lora!r} do not go together")
    folder = pipeline_folder(path)
    _check_pipeline(folder)
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    dtype = frozen if train == "lora" else torch.float32
    transformer = _load_part(WanTransformer3DModel, folder, "transformer", torch_dtype=dtype)
    check_backend(
        attention,
        device,
        precision=precision,
        train=train,
        gradient_checkpointing=gradient_checkpointing,
        head_dim=transformer.config["attention_head_dim"],
    )
    vae = _load_part(AutoencoderKLWan, folder, "vae", torch_dtype=torch.float32)
    text_encoder = _load_part(UMT5EncoderModel, folder, "text_encoder", dtype=frozen)
    _check_text_to_video(transformer, vae, path)
    if lora is not None:
        add_lora(transformer, lora, seed=seed)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.set_attention_backend(attention)
    wan = Wan(
        transformer=transformer.to(device).train(),
        vae=vae.to(device).requires_grad_(False).eval(),
        text_encoder=text_encoder.to(device).requires_grad_(False).eval(),
        tokenizer=_load_tokenizer(folder),
        folder=folder,
    )
    return _checked(wan)


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
) -> TextEncoder:
    """Loads the text encoder of a diffusers Wan pipeline and nothing else of it.

    Args:
        path: pipeline folder, shipped asset or hub id.
        precision: of its weights.
        device: where it goes.

    Raises:
        UserError: the folder or the hub id cannot be used.
    """
    folder = pipeline_folder(path, TEXT_PARTS[:1])
    for part in TEXT_PARTS:
        if not (folder / part).is_dir():
            raise UserError(f"model.path: {folder} has no {part}/ folder")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = _load_part(UMT5EncoderModel, folder, "text_encoder", dtype=dtype)
    _check_part(folder, "text_encoder", model)
    return TextEncoder(
        model.to(device).requires_grad_(False).eval(),
        _load_tokenizer(folder),
        folder,
    )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded = load_pretrained(
        AutoTokenizer,
        folder / "tokenizer",
        setting="model.path",
        config_file="tokenizer_config.json",
    )
    assert isinstance(loaded, PreTrainedTokenizerBase)
    if loaded.pad_token is None:
        raise UserError(f"model.path: {folder / 'tokenizer'} has no pad_token: fetch it again")
    return loaded


def _load_part(model_class: Any, folder: Path, part: str, **dtype: Any) -> Any:
    """Loads one model and insists that no weight was left at its random initial value."""
    model, info = load_pretrained(
        model_class,
        folder / part,
        setting="model.path",
        use_safetensors=True,
        output_loading_info=True,
        **dtype,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"model.path: {folder / part} lacks {len(missing)} weights, e.g. {missing[0]}"
        )
    return model


def _checked(wan: Wan) -> Wan:
    """Refuses weights that are not finite or all zero, and latents that cannot be normalised."""
    for part in ("transformer", "vae", "text_encoder"):
        _check_part(wan.folder, part, getattr(wan, part))
    config = wan.vae.config
    mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(
            f"model.path: {wan.folder / 'vae' / 'config.json'}: latents_mean must be finite, and "
            "latents_std finite and above 0; fetch it again"
        )
    return wan


def _check_part(folder: Path, part: str, model: nn.Module) -> None:
    """Refuses a part, or a half of the autoencoder, with weights not finite or all zero."""
    where = f"model.path: {folder / part}"
    check_weights(where, model.named_parameters())
    for half, child in model.named_children():
        if half in ("encoder", "decoder"):
            check_weights(f"{where}, {half}", child.named_parameters())


def _check_pipeline(folder: Path) -> None:
    """Refuses a folder that is no pipeline with one transformer and a scheduler of diffusers."""
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


def _class_name(index: Mapping[str, Any], part: str) -> Any:
    """The class that a `model_index.json` has for a part; None where it has none."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _check_text_to_video(
    transformer: WanTransformer3DModel, vae: AutoencoderKLWan, path: str
) -> None:
    inputs, latents = transformer.config["in_channels"], vae.config["z_dim"]
    if inputs != latents:
        raise UserError(
            f"model.path: {path} is no text-to-video model: its transformer takes {inputs} "
            f"channels, its autoencoder gives {latents}"
        )
