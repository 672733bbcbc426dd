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
from alignlab.data.shapes import draw_reference
from alignlab.data.shapes_world import Subject, all_subjects
from alignlab.flow import euler_sample
from alignlab.pretrain.clips import SIZE, ClipPool, shapes_clips
from alignlab.pretrain.dino import coverage, pool
from alignlab.pretrain.vae import to_signed
from alignlab.randomness import generator
from alignlab.teachers import Teacher
from alignlab.wan import Wan

HELD_OUT_SEED = 2000
PSNR_FLOOR = 24.0
RETRIEVAL_FLOOR = 0.9
NAMED_FLOOR = 0.12  # chance is 0.06, real clips reach 0.59: colours are right, shapes are not yet
DISTRACTORS = 15


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


def named_accuracy(
    wan: Wan, teacher: Teacher, samples: list[Sample], *, steps: int = 20, guidance: float = 4.0
) -> float:
    """Do clips that the base model generates from a caption show the subjects it names?

    For every named subject, the teacher ranks the phrase among 15 distractor phrases: a phrase
    scores by the greatest cosine between a patch of the generated clip and the pooled feature of
    any of its four identities (one per accent, which the caption does not name). The result is the
    share of named subjects that come out on top; chance is 1/16. Real clips give the ceiling.
    """
    clips = [generate(wan, s.caption, number, steps, guidance) for number, s in enumerate(samples)]
    return phrase_accuracy(teacher, clips, samples)


def phrase_accuracy(teacher: Teacher, clips: list[Tensor], samples: list[Sample]) -> float:
    """The measurement of `named_accuracy` on given uint8 clips `(T, H, W, C)`."""
    banks = _phrase_features(teacher)
    phrases = sorted(banks)
    hits = []
    for number, (clip, sample) in enumerate(zip(clips, samples, strict=True)):
        grid = (SIZE[0] // teacher.patch_size, SIZE[1] // teacher.patch_size)
        tokens = teacher.encode(clip[None], grid).tokens_BTPD[0].flatten(0, 1)
        patches_ND = F.normalize(tokens, dim=-1)
        draw = random.Random(number)
        others = [p for p in phrases if p not in sample.entities]
        for phrase in sample.entities:
            rivals = draw.sample(others, DISTRACTORS)
            score = [float((patches_ND @ banks[p].T).max()) for p in [phrase, *rivals]]
            hits.append(score[0] > max(score[1:]))
    return sum(hits) / len(hits)


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


def _phrase_features(teacher: Teacher) -> dict[str, Tensor]:
    rng = np.random.default_rng(HELD_OUT_SEED + 1)
    banks: dict[str, list[Tensor]] = {}
    for subject in all_subjects():
        banks.setdefault(subject.phrase, []).append(_pooled(teacher, subject, rng))
    return {phrase: torch.stack(features) for phrase, features in banks.items()}


def _pooled(teacher: Teacher, subject: Subject, rng: np.random.Generator) -> Tensor:
    reference = draw_reference(subject, rng, *SIZE)
    grid = (SIZE[0] // teacher.patch_size, SIZE[1] // teacher.patch_size)
    tokens = teacher.encode(reference.image_HWC[None, None], grid).tokens_BTPD[0, 0]
    return pool(tokens, coverage(reference.mask_HW))
