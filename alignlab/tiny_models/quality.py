"""Quality floors of the tiny models, measured on clips that no stage saw.

Used by `alignlab assets build`, which writes what it measured, and by the tests, which measure
again. Shape letters: B batch, P patches, D width, S subjects.
"""

import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.data.sample import Sample
from alignlab.data.shapes.dataset import draw_reference
from alignlab.data.shapes.world import Subject, all_subjects
from alignlab.evaluation.collectors import GenerationCollector
from alignlab.evaluation.metric_registry import NAMED_SUBJECT_METRICS
from alignlab.evaluation.named_subjects import AttributeProbes
from alignlab.models.wan import Wan
from alignlab.randomness import generator
from alignlab.teachers import Teacher
from alignlab.tiny_models.clips import SIZE, ClipPool, shapes_clips
from alignlab.tiny_models.dino import coverage, pool
from alignlab.tiny_models.vae import to_signed
from alignlab.training.flow_matching import euler_sample

HELD_OUT_SEED = 2000
PSNR_FLOOR = 24.0
RETRIEVAL_FLOOR = 0.9
PROBE_SEED = 3000
PROBE_CLIPS = 300
# of `NAMED_SUBJECT_METRICS`
NAMED_FLOORS = {
    "named_color": 0.8,
    "named_motion": 0.48,
    "named_texture": 0.3,
    "named_shape": 0.2,
    "named_all": 0.02,
}


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
    drawn = random.Random(HELD_OUT_SEED).sample(all_subjects(), subjects)
    poses = [torch.stack([_pooled(teacher, s, rng) for s in drawn]) for _ in range(2)]
    nearest = (poses[0] @ poses[1].T).argmax(1)
    return float((nearest == torch.arange(subjects)).float().mean())


def fitted_probes(teacher: Teacher) -> AttributeProbes:
    """Attribute probes of the teacher, fitted on clips of a seed of their own."""
    clips = ClipPool(shapes_clips(PROBE_CLIPS, seed=PROBE_SEED)).samples
    return AttributeProbes(teacher, clips, _grid(teacher))


def named_subjects(
    teacher: Teacher, probes: AttributeProbes, clips: Iterable[Tensor], samples: list[Sample]
) -> dict[str, float]:
    """`NAMED_SUBJECT_METRICS`: do uint8 clips show the subjects that the samples' captions name?

    Of clips that the base model generates (`generate`) it says what the model can; of real clips
    that went through the autoencoder, what autoencoder and teacher allow.
    """
    collector = GenerationCollector(
        teacher,
        _grid(teacher),
        subjects_by_colour=False,
        probes=probes,
        metrics=NAMED_SUBJECT_METRICS,
    )
    for clip_THWC, sample in zip(clips, samples, strict=True):
        collector.add(clip_THWC, sample)
    return collector.metrics()


def generated_clips(wan: Wan, samples: list[Sample]) -> Iterator[Tensor]:
    """One clip of the base model for each caption."""
    for number, sample in enumerate(samples):
        yield generate(wan, sample.caption, number)


def autoencoded_clips(wan: Wan, samples: list[Sample]) -> Iterator[Tensor]:
    """Each clip as it comes out of the autoencoder."""
    for sample in samples:
        yield wan.decode(wan.encode_video(sample.video_THWC))


@torch.no_grad()
def generate(
    wan: Wan, caption: str, seed: int, *, steps: int = 20, guidance: float = 3.0
) -> Tensor:
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
    tokens = teacher.encode(reference.image_HWC[None, None], _grid(teacher)).tokens_BTPD[0, 0]
    return pool(tokens, coverage(reference.mask_HW))


def _grid(teacher: Teacher) -> tuple[int, int]:
    """The teacher's patches on a clip of the assets."""
    return SIZE[0] // teacher.patch_size, SIZE[1] // teacher.patch_size
