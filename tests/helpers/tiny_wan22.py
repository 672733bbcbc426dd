"""Tiny pipeline folders laid out as Wan 2.2's, of real classes with random weights of 2 blocks."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from tiny_wan import autoencoder, strengthen, text_encoder_of, tokenizer_of_captions

BOUNDARY = 0.875


def _transformer(channels: int) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    strengthen(model)
    return model


def _scheduler(shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def write_a14b(folder: Path) -> Path:
    """Writes the layout of `Wan2.2-T2V-A14B`: two transformers, Wan 2.1's kind of autoencoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tokenizer_of_captions()
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder_of(tokenizer),
            vae=autoencoder(),
            scheduler=_scheduler(12.0),
            transformer=_transformer(16),
            transformer_2=_transformer(16),
            boundary_ratio=BOUNDARY,
        )
    pipeline.save_pretrained(folder)
    return folder


def write_ti2v(folder: Path) -> Path:
    """Writes the layout of `Wan2.2-TI2V-5B`: one transformer, 48 channels, strides 4x16x16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tokenizer_of_captions()
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder_of(tokenizer),
            vae=_residual_autoencoder(),
            scheduler=_scheduler(5.0),
            transformer=_transformer(48),
            transformer_2=None,
            boundary_ratio=None,
            expand_timesteps=True,
        )
    pipeline.save_pretrained(folder)
    return folder


def _residual_autoencoder() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.02 * i - 0.5 for i in range(48)],
        latents_std=[0.5 + 0.02 * i for i in range(48)],
    )
