"""`alignlab assets build`: trains the embedded tiny models from nothing, stage by stage.

Stages `vae`, `dino` and `wan` each keep their state in the work folder, so a killed build goes on
where it was. Weights are written in half precision.
"""

import hashlib
import json
import logging
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file

from alignlab.pretrain.clips import ClipPool, shapes_clips
from alignlab.pretrain.dino import train_dino
from alignlab.pretrain.quality import (
    held_out_clips,
    named_accuracy,
    reconstruction_psnr,
    subject_accuracy,
)
from alignlab.pretrain.text import build_tokenizer
from alignlab.pretrain.vae import train_vae
from alignlab.pretrain.wan import encode_clips, train_wan
from alignlab.teachers import load_teacher
from alignlab.wan import load_wan

log = logging.getLogger(__name__)

DINO_CLIPS = 5000
VAE_CLIPS = 3000  # enough for a codec, and half the memory
WAN_CLIPS = 16000
WAN_SUBJECTS = (1, 3)  # a lone subject teaches what a word looks like soonest
VAE_STEPS = 1600
VAE_DECODER_STEPS = 4200
DINO_STEPS = 2500
WAN_STEPS = 7500


def build(out: Path, *, work: Path = Path("runs/assets")) -> Path:
    """Writes `tiny-wan/`, `tiny-dino/`, `checksums.json` and `quality.json` under `out`.

    Takes hours on two CPU cores. Rebuilt weights differ in the last bits between
    machines, so their checksums do too; the floors in `quality.py` must hold all the same.
    """
    vae_clips = ClipPool(shapes_clips(VAE_CLIPS))
    vae = train_vae(vae_clips, steps=VAE_STEPS, decoder_steps=VAE_DECODER_STEPS, work=work)
    dino = train_dino(ClipPool(shapes_clips(DINO_CLIPS)), steps=DINO_STEPS, work=work)
    clips = shapes_clips(WAN_CLIPS, subjects=WAN_SUBJECTS)
    latents, captions = encode_clips(vae, clips, work=work)
    tokenizer = build_tokenizer(captions)
    model = train_wan(latents, captions, tokenizer, steps=WAN_STEPS, work=work)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        transformer=model.transformer,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipeline.save_pretrained(out / "tiny-wan")
    dino.save_pretrained(out / "tiny-dino")
    for weights in sorted(out.glob("tiny-*/**/*.safetensors")):
        halve(weights)
    (out / "checksums.json").write_text(json.dumps(checksums(out), indent=1) + "\n")
    (out / "quality.json").write_text(json.dumps(measure(out), indent=1) + "\n")
    return out


def halve(weights: Path) -> None:
    """Rewrites a safetensors file in half precision (the loaders cast back to fp32)."""
    tensors = load_file(weights)
    small = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
    save_file(small, weights, metadata={"format": "pt"})


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file of the two model folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("tiny-*/**/*"))
        if path.is_file()
    }


def measure(folder: Path) -> dict[str, float]:
    """The figures that the floors are about."""
    wan = load_wan(str(folder / "tiny-wan"))
    teacher = load_teacher("tiny-dino", path=str(folder / "tiny-dino"))
    samples = held_out_clips(48)
    figures = {
        "vae_psnr_db": reconstruction_psnr(wan, samples),
        "dino_subject_accuracy": subject_accuracy(teacher),
        "wan_named_accuracy": named_accuracy(wan, teacher, samples),
    }
    log.info("quality: %s", figures)
    return {key: round(value, 4) for key, value in figures.items()}
