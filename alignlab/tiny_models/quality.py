"""Quality floors of the tiny models, measured on clips that no stage saw.

Used by `alignlab assets build`, which writes what it measured, and by the tests, which measure
again. Shape letters: B batch, P patches, D width, S subjects.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.data.sample import Sample
from alignlab.data.shapes.dataset import draw_reference
from alignlab.data.shapes.world import Subject, all_subjects
from alignlab.models.wan import Wan
from alignlab.randomness import generator
from alignlab.teachers import Teacher
from alignlab.tiny_models.clips import SIZE, ClipPool, shapes_clips
from alignlab.tiny_models.dino import coverage, pool
from alignlab.tiny_models.named import NamedSubjects, Recognised
from alignlab.tiny_models.vae import to_signed
from alignlab.training.flow_matching import euler_sample

HELD_OUT_SEED = 2000
PSNR_FLOOR = 24.0
RETRIEVAL_FLOOR = 0.9
PROBE_SEED = 3000
PROBE_CLIPS = 300
NAMED_FLOORS = Recognised(color=0.8, motion=0.48, texture=0.3, shape=0.2, all=0.02)


def probe_clips() -> list[Sample]:
    """Clips that the probes of `NamedSubjects` are fitted to."""
    return ClipPool(shapes_clips(PROBE_CLIPS, seed=PROBE_SEED)).samples


def held_out_clips(count: int) -> list[Sample]:
    """Clips of a seed that neither the assets nor the default recipes use."""
    return ClipPool(shapes_clips(count, seed=HELD_OUT_SEED)).samples


def reconstruction_psnr(wan: Wan, samples: list[Sample]) -> float:
    """Mean PSNR in dB of encode-decode over clips, on the 0..1 scale."""
    values = []
    for sample in samples:
        out = to_signed(wan.decode(wan.encode_video(sample.video_THWC))[None])
        mse = F.mse_loss(out, to_signed(sample.video_THWC[None])) / 4.0
        values.append(-10 * torch.log10(mse))
    return float(torch.stack(values).mean())


def subject_accuracy(teacher: Teacher, subjects: int = 200) -> float:
    """1-NN subject accuracy across poses.

    Each of `subjects` identities is drawn in two poses; the foreground-pooled features of one pose
    look up the nearest of the other. Chance is 1 / `subjects`.
    """
    rng = np.random.default_rng(HELD_OUT_SEED)
    chosen = random.Random(HELD_OUT_SEED).sample(all_subjects(), subjects)
    poses = [torch.stack([_pooled(teacher, s, rng) for s in chosen]) for _ in range(2)]
    nearest = (poses[0] @ poses[1].T).argmax(1)
    return float((nearest == torch.arange(subjects)).float().mean())


def named_subjects(
    wan: Wan,
    measure: NamedSubjects,
    samples: list[Sample],
    *,
    steps: int = 20,
    guidance: float = 3.0,
) -> Recognised:
    """Do clips that the base model generates from a caption show the subjects that it names?

    The same measure on autoencoded real clips says what the autoencoder and the teacher allow.
    """
    clips = [generate(wan, s.caption, number, steps, guidance) for number, s in enumerate(samples)]
    return measure.recognised(clips, samples)


def autoencoded_subjects(wan: Wan, measure: NamedSubjects, samples: list[Sample]) -> Recognised:
    """The measure on real clips that went through the autoencoder: the ceiling for samples."""
    return measure.recognised(
        [wan.decode(wan.encode_video(s.video_THWC)) for s in samples], samples
    )


@torch.no_grad()
def generate(wan: Wan, caption: str, seed: int, steps: int, guidance: float) -> Tensor:
    """One text-to-video clip of the base model, uint8 `(T, H, W, C)`."""
    empty, text = wan.encode_text(["", caption])
    shape = (int(wan.vae.config.z_dim), 3, SIZE[0] // 8, SIZE[1] // 8)
    noise = torch.randn(shape, generator=generator(seed, "quality"))
    text_BLD = torch.stack([empty, text])

    def velocity_at(latents: Tensor, sigma: float) -> Tensor:
        timesteps = torch.full((2,), sigma * 1000)
        pair = latents.expand(2, *latents.shape)
        without, with_text = wan.transformer(pair, timesteps, text_BLD, return_dict=False)[0]
        guided: Tensor = without + guidance * (with_text - without)
        return guided

    return wan.decode(euler_sample(velocity_at, noise, steps=steps, shift=3.0))


def _pooled(teacher: Teacher, subject: Subject, rng: np.random.Generator) -> Tensor:
    reference = draw_reference(subject, rng, *SIZE)
    grid = (SIZE[0] // teacher.patch_size, SIZE[1] // teacher.patch_size)
    tokens = teacher.encode(reference.image_HWC[None, None], grid).tokens_BTPD[0, 0]
    return pool(tokens, coverage(reference.mask_HW))
