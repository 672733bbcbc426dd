"""`alignlab assets build`: trains the embedded tiny models from nothing, stage by stage.

Stages `vae`, `dino` and `wan` each keep their state in the work folder, so a killed build resumes
there. Weights are written in half precision.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file

from alignlab.errors import UserError
from alignlab.models.model_files import load_pretrained
from alignlab.models.wan import load_wan
from alignlab.runs.atomic_files import whole_file, write_text
from alignlab.runs.out_paths import out_folder
from alignlab.teachers import load_teacher
from alignlab.tiny_models.clips import ClipPool, shapes_clips
from alignlab.tiny_models.dino import train_dino
from alignlab.tiny_models.quality import (
    autoencoded_clips,
    fitted_probes,
    generated_clips,
    held_out_clips,
    named_subjects,
    reconstruction_psnr,
    subject_accuracy,
)
from alignlab.tiny_models.text import build_tokenizer
from alignlab.tiny_models.vae import fit_latent_statistics, train_vae
from alignlab.tiny_models.wan import encode_clips, train_wan

KEPT = {"vae": "tiny-wan/vae", "dino": "tiny-dino"}

log = logging.getLogger(__name__)

CLIPS = 5000  # of the teacher and the tokenizer
VAE_CLIPS = 3000  # enough for a codec, and half the memory
WAN_CLIPS = 16000
WAN_SUBJECTS = (1, 3)  # a lone subject teaches what a word looks like soonest
VAE_STEPS = 1600
VAE_DECODER_STEPS = 4200
DINO_STEPS = 2500
WAN_STEPS = 10500


def build(out: Path, *, work: Path = Path("runs/assets"), keep: Collection[str] = ()) -> Path:
    """Writes `tiny-wan/`, `tiny-dino/`, `checksums.json` and `quality.json` under `out`.

    Takes hours on two CPU cores. Rebuilt weights differ in the last bits between
    machines, so their checksums do too; the floors in `quality.py` must hold all the same.

    Args:
        out: folder of the assets.
        work: where stages keep their state.
        keep: stages, of `vae` and `dino`, whose model in `out` is used instead of trained.

    Raises:
        UserError: a kept stage's model is not there.
    """
    for stage, folder in KEPT.items():
        if stage in keep and not (out / folder / "config.json").is_file():
            raise UserError(f"--keep {stage}: {out / folder} holds no model")
    with out_folder(out), out_folder(work):
        _build(out, work, keep)
    return out


def _build(out: Path, work: Path, keep: Collection[str]) -> None:
    vae = _vae(out, work, "vae" in keep)
    pool = ClipPool(shapes_clips(CLIPS))
    tokenizer = build_tokenizer([sample.caption for sample in pool.samples])
    if "dino" not in keep:
        train_dino(pool, steps=DINO_STEPS, work=work).save_pretrained(out / "tiny-dino")
    clips = shapes_clips(WAN_CLIPS, subjects=WAN_SUBJECTS)
    latents, captions = encode_clips(vae, clips, work=work)
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
    for weights in sorted(out.glob("tiny-*/**/*.safetensors")):
        halve(weights)
    for config in sorted(out.glob("tiny-*/**/config.json")):
        forget_origin(config)
    write_text(out / "checksums.json", json.dumps(checksums(out), indent=1) + "\n")
    write_text(out / "quality.json", json.dumps(measure(out), indent=1) + "\n")


def _vae(out: Path, work: Path, keep: bool) -> AutoencoderKLWan:
    """The autoencoder with its latent statistics, trained or as `out` has it."""
    clips = ClipPool(shapes_clips(VAE_CLIPS))
    if keep:
        folder = out / KEPT["vae"]
        loaded = load_pretrained(
            AutoencoderKLWan, folder, setting="--keep", torch_dtype=torch.float32
        )
        assert isinstance(loaded, AutoencoderKLWan)
        vae = loaded.eval().requires_grad_(False)
    else:
        vae = train_vae(clips, steps=VAE_STEPS, decoder_steps=VAE_DECODER_STEPS, work=work)
        vae = vae.half().float()  # the latents are to be those of the weights that are shipped
    fit_latent_statistics(vae, clips)
    return vae


def halve(weights: Path) -> None:
    """Rewrites a safetensors file in half precision (the loaders cast back to fp32)."""
    tensors = load_file(weights)
    small = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
    with whole_file(weights) as partial:
        save_file(small, partial, metadata={"format": "pt"})


def forget_origin(config: Path) -> None:
    """Removes the folder that a kept model was loaded from, which diffusers writes down."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    write_text(config, json.dumps(settings, indent=2, sort_keys=True) + "\n")


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
    probes = fitted_probes(teacher)
    generated = named_subjects(teacher, probes, generated_clips(wan, samples), samples)
    autoencoded = named_subjects(teacher, probes, autoencoded_clips(wan, samples), samples)
    figures = {
        "vae_psnr_db": reconstruction_psnr(wan, samples),
        "dino_subject_accuracy": subject_accuracy(teacher),
        **{f"wan_{name}": value for name, value in generated.items()},
        **{f"autoencoded_{name}": value for name, value in autoencoded.items()},
    }
    log.info("quality: %s", figures)
    return {key: round(value, 4) for key, value in figures.items()}
