"""The frozen encoders of a Wan pipeline, each loaded when it is first needed.

Shape letters: C channels, T frames, H height, W width, L text tokens, D width. `T`, `H`, `W` count
pixels for uint8 tensors and latent cells for latents.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from alignlab.config.model import TextEncoderPlace
from alignlab.dataset_cache.key import Part
from alignlab.errors import UserError
from alignlab.losses.objective import Grid
from alignlab.models.late_model import LateModel
from alignlab.models.model_files import read_object
from alignlab.models.pipeline_parts import check_late_load, encoder_parts, load_frozen
from alignlab.models.text_encoder import TextEncoder


@dataclass(frozen=True)
class FrozenParts:
    """Autoencoder and text encoder. What is cached of them needs no weights.

    Args:
        folder: of the pipeline; its files were looked at (`check_model_files`).
        text_dtype: of the text encoder. The autoencoder is fp32, because it loses detail in bf16
            (diffusers' own advice).
        device: where they run.
        text_encoder: `cpu`: the text encoder runs on the CPU. `auto`, `keep`: as `device` says;
            whoever knows that it has done its work frees it (`alignlab.training.texts_ahead`).
        parks_vae: the autoencoder lies on the CPU unless it encodes or decodes.
    """

    folder: Path
    text_dtype: torch.dtype
    device: torch.device
    text_encoder: TextEncoderPlace = "auto"
    parks_vae: bool = False

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder with its tokenizer."""
        device = torch.device("cpu") if self.text_encoder == "cpu" else self.device
        return TextEncoder(self.folder, self.text_dtype, device)

    @property
    def vae(self) -> AutoencoderKLWan:
        """The autoencoder, loaded now.

        Raises:
            UserError: its files cannot be used, or have changed since `vae_parts` named them.
        """
        return self.late_vae.loaded()

    @cached_property
    def late_vae(self) -> LateModel[AutoencoderKLWan]:
        """The autoencoder, loaded when it is first used."""
        return LateModel(self._load_vae, self.device, is_parked=self.parks_vae)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's settings, without its weights.

        Raises:
            UserError: latents could not be normalised, or their size is unknown.
        """
        path = self.folder / "vae" / "config.json"
        parameters = inspect.signature(AutoencoderKLWan.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        config = defaults | read_object(path, setting="model.path")
        for name in ("z_dim", "scale_factor_temporal", "scale_factor_spatial"):
            if type(config[name]) is not int or config[name] < 1:
                raise UserError(f"model.path: {path}: {name} is no whole number; fetch it again")
        try:
            mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
            is_usable = mean.isfinite().all() and std.isfinite().all() and (std > 0).all()
            is_usable &= mean.shape == std.shape == (config["z_dim"],)
        except (TypeError, ValueError, RuntimeError):
            is_usable = torch.tensor(False)
        if not is_usable:
            raise UserError(
                f"model.path: {path}: latents_mean must be finite, and latents_std finite and "
                f"above 0, each of {config['z_dim']} numbers (z_dim); fetch it again"
            )
        return config

    def token_grid(self, patch: Sequence[int], frames: int, height: int, width: int) -> Grid:
        """The video token grid (T, H, W) of a transformer with patches of so many latent cells.

        Raises:
            UserError: the clip does not fit the strides of the autoencoder and the patches.
        """
        patch_t, patch_h, patch_w = patch
        stride_t = self.vae_config["scale_factor_temporal"]
        stride = self.vae_config["scale_factor_spatial"]
        if (frames - 1) % stride_t:
            raise UserError(f"data.frames: {frames} is not a multiple of {stride_t} plus 1")
        token = stride * patch_h, stride * patch_w
        if height % token[0] or width % token[1]:
            sides = zip((height, width), token, strict=True)
            nearest = [max(step, round(side / step) * step) for side, step in sides]
            raise UserError(
                f"data.size: {height}x{width} is not a multiple of {token[0]}x{token[1]} "
                f"(autoencoder stride times patch): nearest is {nearest}"
            )
        latent_frames = 1 + (frames - 1) // stride_t
        return (
            latent_frames // patch_t,
            height // (stride * patch_h),
            width // (stride * patch_w),
        )

    @cached_property
    def vae_parts(self) -> dict[str, Part]:
        """What latents depend on besides the pixels, for keys of the dataset cache."""
        return encoder_parts(self.folder, ("vae",), torch.float32, self.device)

    def is_same(self, other: "FrozenParts") -> bool:
        """Whether another one, made later, would load the same files in the same way."""
        if self != other or self.vae_parts != other.vae_parts:
            return False
        return self.text.parts == other.text.parts

    def load(self) -> None:
        """Loads all that is not loaded yet.

        Raises:
            UserError: files cannot be used.
        """
        self.late_vae.loaded()
        self.text.load()

    @torch.no_grad()
    def encode_video(self, video_THWC: Tensor) -> Tensor:
        """uint8 frames to normalised fp32 latents (C, T, H, W).

        Takes the mode of the posterior, so that the same clip always has the same latents, and
        normalises with the autoencoder's `latents_mean` and `latents_std` as WanPipeline does.
        """
        pixels = video_THWC.to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        with self._on_device() as vae:
            latents_BCTHW: Tensor = vae.encode(pixels).latent_dist.mode()
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
        with self._on_device() as vae:
            latents_BCTHW = latents_CTHW.to(self.device).float()[None] * std + mean
            pixels: Tensor = vae.decode(latents_BCTHW, return_dict=False)[0][0]
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

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to fp32 embeddings (B, L, D), zero after each prompt's last token."""
        return self.text.encode(prompts)

    @contextmanager
    def _on_device(self) -> Iterator[AutoencoderKLWan]:
        """The autoencoder on its device, in fp32 whatever is around it."""
        with self.late_vae.in_use() as vae, torch.autocast(self.device.type, enabled=False):
            yield vae

    def _load_vae(self) -> AutoencoderKLWan:
        vae: AutoencoderKLWan = load_frozen(
            AutoencoderKLWan, self.folder, "vae", torch_dtype=torch.float32
        )
        check_late_load(self.folder, "vae", vars(self).get("vae_parts"))
        return vae

    @cached_property
    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        config, shape = self.vae_config, (1, -1, 1, 1, 1)
        mean = torch.tensor(config["latents_mean"], device=self.device).view(shape)
        return mean, torch.tensor(config["latents_std"], device=self.device).view(shape)
