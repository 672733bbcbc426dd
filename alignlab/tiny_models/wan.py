"""Stage `wan`: a tiny `WanTransformer3DModel`, pretrained text-to-video on `shapes`.

As the released Wan, it never saw a reference image or an alignment loss.
Shape letters: B batch, C channels, T latent frames, H, W latent height and width, L text tokens.
"""

import hashlib
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.progress import step_progress
from alignlab.randomness import generator
from alignlab.runs.atomic_files import whole_file
from alignlab.tiny_models.stage import train_stage
from alignlab.tiny_models.text import TEXT_DIM, build_text_encoder
from alignlab.tiny_models.vae import Z_DIM, to_signed
from alignlab.training.flow_matching import interpolate, shifted

BATCH = 64
ENCODE_BATCH = 16
TEXT_DROPOUT = 0.1
SHIFT = 1.5
WAN_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": Z_DIM,
    "out_channels": Z_DIM,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 8,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}


class TextToVideo(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(**WAN_CONFIG)
        self.text_encoder: UMT5EncoderModel = build_text_encoder(vocabulary)

    def encode(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Text embeddings with zeros after the last token, as the Wan pipeline feeds them."""
        states: Tensor = self.text_encoder(ids_BL, attention_mask=mask_BL).last_hidden_state
        return states * mask_BL[..., None]


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan, clips: ShapesDataset, *, work: Path
) -> tuple[Tensor, list[str]]:
    """Normalised latents `(clips, C, T, H, W)` and captions; kept in `work` for a next time."""
    statistics = (vae.config.latents_mean, vae.config.latents_std)
    identity = hashlib.sha256(repr((clips.config, statistics)).encode())
    for parameter in vae.encoder.parameters():
        identity.update(parameter.numpy().tobytes())
    kept = work / f"latents-{identity.hexdigest()[:12]}.safetensors"
    if not kept.exists():
        latents, captions = _encode(vae, clips)
        work.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as partial:
            save_file({"latents": latents}, partial, metadata={"captions": json.dumps(captions)})
    with safe_open(kept, "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["captions"])


def _encode(vae: AutoencoderKLWan, clips: ShapesDataset) -> tuple[Tensor, list[str]]:
    mean, std = (
        torch.tensor(v)[:, None, None, None]
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents, captions = [], []
    with step_progress("latents", total=len(clips)) as advance:
        for first in range(0, len(clips), ENCODE_BATCH):
            samples = [clips[i] for i in range(first, min(first + ENCODE_BATCH, len(clips)))]
            videos = to_signed(torch.stack([s.video_THWC for s in samples]))
            latents.append((vae.encode(videos).latent_dist.mode() - mean) / std)
            captions += [s.caption for s in samples]
            advance(len(captions), "")
    return torch.cat(latents), captions


def train_wan(
    latents_NCTHW: Tensor,
    captions: list[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    work: Path,
) -> TextToVideo:
    """Flow matching on cached latents: logit-normal times, shift 1.5, 10 % of captions dropped.

    The forward pass runs in bf16 under autocast, with fp32 weights.
    """
    torch.manual_seed(2)
    model = TextToVideo(len(tokenizer))
    for block in model.transformer.blocks:
        block.compile()  # 1.7 times faster on a CPU; needs a C++ compiler
    kwargs = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    text = tokenizer(captions, **kwargs)
    empty = tokenizer([""], **kwargs)

    def loss_at(step: int) -> dict[str, Tensor]:
        rng = generator(0, "wan", step)
        pick = torch.randint(len(latents_NCTHW), (BATCH,), generator=rng)
        drop = (torch.rand(BATCH, 1, generator=rng) < TEXT_DROPOUT).long()
        ids = torch.where(drop == 1, empty.input_ids, text.input_ids[pick])
        mask = torch.where(drop == 1, empty.attention_mask, text.attention_mask[pick])
        x0 = latents_NCTHW[pick]
        noise = torch.randn(x0.shape, generator=rng)
        u = torch.sigmoid(torch.randn(BATCH, generator=rng))
        sigma_B = shifted(u, SHIFT)
        noisy = interpolate(x0, noise, sigma_B)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model.transformer(
                noisy, sigma_B * 1000, model.encode(ids, mask), return_dict=False
            )[0]
        # one mean over everything: that of the shipped weights
        return {"flow": (velocity.float() - (noise - x0)).square().mean()}

    train_stage("wan", model, loss_at, steps=steps, work=work)
    return model.eval().requires_grad_(False)
