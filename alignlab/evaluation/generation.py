"""Clips that a trained model generates for the val split's conditions: written and measured.

Shape letters: T frames, H height, W width, C channels (RGB) or of latents.
"""

import json
import logging
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from alignlab.data.video import write_mp4
from alignlab.evaluation.collectors import GenerationCollector
from alignlab.evaluation.metric_registry import GENERATION_METRICS
from alignlab.evaluation.own_metrics import own_names, own_rows
from alignlab.models.other_expert import OtherExpert, other_expert
from alignlab.models.reference_branch import ReferenceBranch
from alignlab.models.text_encoder import warn_of_cut
from alignlab.progress import Advance, step_progress
from alignlab.randomness import generator
from alignlab.runs.atomic_files import whole_file, write_text
from alignlab.sampling import guidance_of, latent_shape, negative_text, sample_latents
from alignlab.teachers import Teacher
from alignlab.training.clip_memory import ClipMemory, MadeOnce
from alignlab.training.encoded import Encoded
from alignlab.training.setup import Run

log = logging.getLogger(__name__)

LISTING = "samples.json"  # beside the clips; written last
OF_SAMPLES_BYTES = 2**28  # of what is kept of val clips for the clips of other runs
NOISE_SEED = 0  # of the starting noise: the same for every run, whatever its recipe and seed


@torch.no_grad()
def generate(
    run: Run, branch: ReferenceBranch, samples: Path | None, teacher: Teacher | None
) -> dict[str, float]:
    """Generates val clips with noise that no seed changes, writes some and measures some.

    The first `eval.sample_clips` go to the folder `samples`, unless it is None: clip i as `i.mp4`
    beside `i-real.mp4` and `i-reference-k.png`; `samples.json` lists them with key and caption. The
    first `eval.generated_clips` are measured (`metric_registry.GENERATION_METRICS`, and what
    `eval.metrics` names of other packages).

    Returns:
        `gen/<name>`, and as a measure of what is within reach `gen_real/<name>`
        (`real_clip_metrics`). Empty when no clip is measured.
    """
    config = run.config.eval
    num_written = 0 if samples is None else min(config.sample_clips, len(run.val_clips))
    num_measured = num_measured_clips(run)
    count = max(num_written, num_measured)
    if not count:
        return {}
    if not run.ranks.is_main:
        _take_part(run, branch, count)
        return {}
    listing = []
    collector, of_samples = _collector(run, teacher), _of_samples(run, teacher)
    steps = config.sample_steps
    with (
        other_expert(run.wan, run.config.model, keeps=True) as other,
        step_progress("samples", total=count * steps) as advance,
    ):
        for i in range(count):
            clip = run.val_clips[i]
            advance_clip = partial(_advance_from, advance, i * steps)
            video_THWC = generated_clip(run, branch, i, other=other, advance=advance_clip)
            if samples is not None and i < num_written:
                files = _write_sample(samples, i, video_THWC, clip, run.config.data.fps)
                listing.append(files)
            if i < num_measured:
                _measure(run, collector, i, video_THWC, of_samples)
    if samples is not None and listing:
        write_text(samples / LISTING, json.dumps(listing, indent=1))
    real = real_clip_metrics(run, teacher, num_measured)
    generated = {f"gen/{name}": value for name, value in collector.metrics().items()}
    for name in own_names(config.metrics):
        if f"gen/{name}" not in generated:
            log.warning("gen/%s: no value of %d clips: it is left out", name, num_measured)
    return generated | {f"gen_real/{name}": value for name, value in real.items()}


def _take_part(run: Run, branch: ReferenceBranch, count: int) -> None:
    """The forward passes of `generate`, on a rank that holds a shard of the model."""
    with other_expert(run.wan, run.config.model, keeps=True) as other:
        for i in range(count):
            _generated_latents(run, branch, i, other, None)


def num_measured_clips(run: Run) -> int:
    """How many generated clips are measured."""
    return min(run.config.eval.num_measured_clips, len(run.val_clips))


def real_clip_metrics(run: Run, teacher: Teacher | None, count: int) -> dict[str, float]:
    """Metrics of the first `count` real clips after the autoencoder.

    No trained weight moves them: they are computed once for all runs that share their caches.
    """
    key = _teacher_key(run, teacher), count, run.config.eval.metrics
    if key not in run.caches.real_metrics:
        collector, of_samples = _collector(run, teacher), _of_samples(run, teacher)
        for i in range(count):
            video_THWC = run.wan.decode(run.val_clips[i].latents_CTHW).cpu()
            _measure(run, collector, i, video_THWC, of_samples)
        run.caches.real_metrics[key] = collector.metrics()
    return run.caches.real_metrics[key]


def _measure(
    run: Run,
    collector: GenerationCollector,
    index: int,
    video_THWC: Tensor,
    of_samples: ClipMemory[MadeOnce],
) -> None:
    """Measures a clip that was generated for a val clip."""
    of_sample = of_samples.get(index) or MadeOnce()
    collector.add(video_THWC, run.val_clips[index].sample, of_sample)
    of_samples.put(index, of_sample)  # with what it got


def _of_samples(run: Run, teacher: Teacher | None) -> ClipMemory[MadeOnce]:
    """What runs that share caches know of val clips and their references."""
    known = run.caches.val_samples
    return known.setdefault(_teacher_key(run, teacher), ClipMemory(OF_SAMPLES_BYTES))


def _teacher_key(run: Run, teacher: Teacher | None) -> str | None:
    """The settings of the teacher that a run is measured against."""
    alias = None if teacher is None else run.config.measured_against
    return None if alias is None else run.config.teachers[alias].model_dump_json()


def generated_clip(
    run: Run,
    branch: ReferenceBranch,
    index: int,
    *,
    other: OtherExpert | None = None,
    advance: Advance | None = None,
) -> Tensor:
    """One clip, uint8 `(T, H, W, C)` on the CPU, for caption and references of a val clip.

    Clips are sampled one at a time: in a batch, a clip's last bits would depend on its neighbours.
    """
    latents = _generated_latents(run, branch, index, other, advance)
    return run.wan.decode(latents).cpu()


def _generated_latents(
    run: Run,
    branch: ReferenceBranch,
    index: int,
    other: OtherExpert | None,
    advance: Advance | None,
) -> Tensor:
    run.meet()  # rank 0 may have decoded and measured the clip before
    clip, device = run.val_clips[index], run.device
    negative = negative_text(run.config.eval.negative_prompt)
    warn_of_cut(run.wan.text, {"eval.negative_prompt": negative})
    negative_LD = run.val_clips.text(negative, where="eval.negative_prompt")
    noise = torch.randn(
        latent_shape(run.wan, run.config), generator=generator(NOISE_SEED, "sample-noise", index)
    )
    return sample_latents(
        branch,
        noise.to(device),
        clip.text_LD.to(device),
        negative_LD.to(device),
        clip.references_KCHW.to(device),
        guidance_of(run.config),
        other=other,
        advance=advance,
    )


def _collector(run: Run, teacher: Teacher | None) -> GenerationCollector:
    data = run.config.data
    grid = run.wan.latent_grid(data.frames, *data.size)
    own = own_rows(run.config.eval.metrics, fps=data.fps, device=run.device)
    return GenerationCollector(
        teacher,
        grid[1:],
        subjects_by_colour=data.subjects_by_colour,
        metrics={**GENERATION_METRICS, **own},
    )


def _advance_from(advance: Advance, start: int, done: int, note: str) -> None:
    advance(start + done, note)


def _write_sample(
    folder: Path, i: int, video_THWC: Tensor, clip: Encoded, fps: int
) -> dict[str, object]:
    folder.mkdir(parents=True, exist_ok=True)
    write_mp4(folder / f"{i}.mp4", video_THWC, fps)
    write_mp4(folder / f"{i}-real.mp4", clip.sample.video_THWC, fps)
    references = [f"{i}-reference-{k}.png" for k in range(len(clip.sample.references))]
    for name, reference in zip(references, clip.sample.references, strict=True):
        with whole_file(folder / name) as partial:
            Image.fromarray(reference.image_HWC.numpy()).save(partial)
    return {
        "key": clip.sample.key,
        "caption": clip.sample.caption,
        "video": f"{i}.mp4",
        "real": f"{i}-real.mp4",
        "references": references,
    }
