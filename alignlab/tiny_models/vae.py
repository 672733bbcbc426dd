"""Stage `vae`: a tiny `AutoencoderKLWan` for 64x64 shapes clips.

The strides are Wan 2.1's, 4 in time and 8 in space; 24 channels instead of 16, because flat shapes
with hard edges compress worse than photographs. Pixels are unshuffled 2x first, as in Wan 2.2's
autoencoder, which makes it four times cheaper on a CPU.
Shape letters: B batch, C channels, T frames, H height, W width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from alignlab.randomness import generator
from alignlab.tiny_models.clips import ClipPool
from alignlab.tiny_models.stage import train_stage

KL_WEIGHT = 2e-6
Z_DIM = 24
SHARE_CLIPS = 16
AMPLITUDE_FLOOR = 0.1
VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": Z_DIM,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * Z_DIM,
    "latents_std": [1.0] * Z_DIM,
}


def to_signed(frames: Tensor) -> Tensor:
    """uint8 `(B, T, H, W, C)` to float `(B, C, T, H, W)` in [-1, 1], as Wan's VAE wants it."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def train_vae(clips: ClipPool, *, steps: int, decoder_steps: int, work: Path) -> AutoencoderKLWan:
    """Trains the autoencoder, then its decoder alone; latents are settled by the first stage."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    train_stage("vae", vae, _loss(vae, clips, "vae"), steps=steps, work=work)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder_loss = _loss(vae, clips, "vae-decoder")
    train_stage("vae-decoder", vae, decoder_loss, steps=decoder_steps, work=work)
    return vae.eval().requires_grad_(False)


def _loss(
    vae: AutoencoderKLWan, clips: ClipPool, purpose: str
) -> Callable[[int], dict[str, Tensor]]:
    def loss_at(step: int) -> dict[str, Tensor]:
        rng = generator(0, purpose, step)
        frames, count = (9, 2) if step % 4 == 0 else (5, 4)
        video = to_signed(clips.videos(rng, count, frames))
        images = to_signed(clips.reference_images(rng, 4))
        noise = rng if purpose == "vae" else None
        pieces = [_reconstruction(vae, x_BCTHW, noise) for x_BCTHW in (video, images)]
        return {key: 0.75 * pieces[0][key] + 0.25 * pieces[1][key] for key in pieces[0]}

    return loss_at


def _reconstruction(
    vae: AutoencoderKLWan, x_BCTHW: Tensor, noise: torch.Generator | None
) -> dict[str, Tensor]:
    """Loss terms; without `noise` the decoder gets the mode of the posterior, as in use."""
    with torch.autocast("cpu", torch.bfloat16):  # convolutions take less than half the time
        posterior = vae.encode(x_BCTHW).latent_dist
        z = posterior.mean
        if noise is not None:
            z = z + posterior.std * torch.randn(z.shape, generator=noise)
        out = vae.decode(z).sample.float()
    l1, mse = F.l1_loss(out, x_BCTHW), F.mse_loss(out, x_BCTHW)
    if noise is None:
        return {"l1": 0.25 * l1, "mse": 4.0 * mse}
    return {"l1": 0.5 * l1, "mse": 2.0 * mse, "kl": KL_WEIGHT * posterior.kl().float().mean()}


@torch.no_grad()
def fit_latent_statistics(vae: AutoencoderKLWan, clips: ClipPool) -> None:
    """Sets the config's latent means and deviations, by which the transformer's input is scaled.

    At unit variance every channel would count alike, and channels that hold fine detail, or that
    the KL term emptied, would be most of what the transformer has to model. So a channel's scaled
    amplitude is the fourth root of its share in the decoded pixels: 1 for the weightiest, half way
    (geometrically) between equal channels and pixels.
    """
    rng = generator(0, "latent-statistics")
    z = torch.cat(
        [vae.encode(x[None]).latent_dist.mode() for x in to_signed(clips.videos(rng, 128, 9))]
    )
    mean, std = z.mean(dim=(0, 2, 3, 4)), z.std(dim=(0, 2, 3, 4))
    share = _pixel_shares(vae, z[:SHARE_CLIPS], mean)
    amplitude = (share / share.max()).pow(0.25).clamp(min=AMPLITUDE_FLOOR)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=(std / amplitude).tolist())


def _pixel_shares(vae: AutoencoderKLWan, z: Tensor, mean_C: Tensor) -> Tensor:
    """Per channel, the mean squared change of the decoded pixels when it is held at its mean."""
    whole = vae.decode(z).sample
    shares = []
    for channel, mean in enumerate(mean_C):
        without = z.clone()
        without[:, channel] = mean
        shares.append(F.mse_loss(vae.decode(without).sample, whole))
    return torch.stack(shares)
