"""What is measured of a trained model, on the val split and with noise that no seed changes.

Shape letters: B batch, C channels, T, H, W of latents or pixels, K references, N tokens, D width.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from alignlab.errors import UserError
from alignlab.evaluation.collectors import ReferenceCollector, VideoCollector
from alignlab.evaluation.generation import generate
from alignlab.models.reference_branch import Output, ReferenceBranch
from alignlab.progress import step_progress
from alignlab.randomness import generator
from alignlab.teachers import Teacher, teacher_from
from alignlab.training.batches import Batch, collate
from alignlab.training.encoded import Encoded
from alignlab.training.flow_matching import flow_loss, interpolate
from alignlab.training.optim import averaged_weights
from alignlab.training.setup import Run

FLOW_BINS = 10
PROBE_SIGMAS = (0.25, 0.5, 0.75)  # of the levels that are trained: with an expert, of its window
FIRST_CLIPS = 2  # with the same noise before and after: enough to see a loss double
EVAL_SEED = 0  # of validation noise: the same for every run, whatever its recipe and seed


@torch.no_grad()
def evaluate(run: Run, samples: Path) -> dict[str, float]:
    """All metrics of a run, as `measure` gives them.

    Args:
        run: whose state is evaluated.
        samples: folder of the generated clips.

    Raises:
        UserError: the validation loss is not finite.
    """
    metrics = measure(run, samples)
    if not math.isfinite(metrics["val/flow"]):
        raise UserError(
            f"DIVERGED: val/flow is not finite after step {run.state.step}: lower optim.lr, "
            f"and remove {samples.parent} or choose another name"
        )
    return metrics


@torch.no_grad()
def measure(
    run: Run, samples: Path | None, *, validation: bool = True, generation: bool = True
) -> dict[str, float]:
    """Metrics of the weights as they are now; of their moving average, if there is one.

    Everything that a training changes is afterwards as it was. Of a model in shards all ranks call
    it; rank 0 has all metrics and writes the clips.

    Args:
        run: whose state is measured.
        samples: folder that generated clips are written to; None: none is written.
        validation: measure `val/flow` and `val/flow/t0..t9` (mean squared flow error at the middle
            of ten noise bins, which with `model.expert` divide its window), and for each block of
            `eval.blocks` the `REFERENCE_METRICS` and `VIDEO_METRICS` of `metric_registry.py`
            against the teacher `eval.teacher`.
        generation: generate clips, and measure what `generate` does.

    Returns:
        Numbers by name. With a validation loss that is not finite nothing else is measured.
    """
    config = run.config.eval
    clips = [run.val_clips[i] for i in range(min(config.clips, len(run.val_clips)))]
    blocks = run.alignment.blocks if config.blocks is None else config.blocks
    alias = run.config.measured_against
    is_main = run.ranks.is_main  # else it takes part in forward passes alone
    teacher = teacher_of(run, alias) if alias and is_main else None
    run.meet()
    metrics: dict[str, float] = {}
    with evaluated_model(run, blocks if alias else ()) as branch:
        if validation:
            metrics |= validation_flow(run, branch, clips)
            if not math.isfinite(metrics["val/flow"]):
                return metrics
            if alias and blocks:
                metrics |= block_metrics(run, branch, clips, teacher)
        if generation:
            metrics |= generate(run, branch, samples, teacher)
    return metrics


@contextmanager
def evaluated_model(run: Run, blocks: Sequence[int] = ()) -> Iterator[ReferenceBranch]:
    """The transformer as it is evaluated: not in training mode, the moving average in place."""
    branch = ReferenceBranch.of(run.wan.transformer, run.config.model, blocks=blocks)
    run.wan.transformer.eval()
    try:
        with averaged_weights(run.state), branch:
            yield branch
    finally:
        run.wan.transformer.train()


@torch.no_grad()
def flow_of_first_clips(run: Run) -> float:
    """`val/flow` of the first two val clips: 20 forward passes of one clip.

    Taken before the first step and after the last, it says whether training diverged. Uses the
    moving average, if there is one.
    """
    count = min(FIRST_CLIPS, run.config.eval.clips, len(run.val_clips))
    clips = [run.val_clips[i] for i in range(count)]
    with evaluated_model(run) as branch:
        return validation_flow(run, branch, clips)["val/flow"]


def validation_flow(run: Run, branch: ReferenceBranch, clips: list[Encoded]) -> dict[str, float]:
    """Flow loss at fixed noise, per noise bin and on average (unweighted)."""
    jobs = [(i, b) for b in range(FLOW_BINS) for i in range(len(clips))]
    losses: dict[int, list[float]] = {b: [] for b in range(FLOW_BINS)}
    size = run.config.eval.batch_size
    with step_progress("val flow", total=len(jobs)) as advance:
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            batch = eval_batch(
                run, clips, [i for i, _ in part], [middle_of_bin(run, b) for _, b in part]
            )
            velocity = denoise(run, branch, batch, capture=False).velocity_BCTHW
            values = flow_loss(velocity, batch.latents_BCTHW, batch.noise_BCTHW).tolist()
            for (_, b), value in zip(part, values, strict=True):
                losses[b].append(value)
            advance(start + len(part), "")
    bins = {f"val/flow/t{b}": sum(v) / len(v) for b, v in losses.items()}
    return {"val/flow": sum(bins.values()) / FLOW_BINS, **bins}


def middle_of_bin(run: Run, number: int) -> float:
    """The noise level of a bin of the validation loss: of [0, 1], or of the expert's window."""
    return run.window.at((number + 0.5) / FLOW_BINS)


def block_metrics(
    run: Run, branch: ReferenceBranch, clips: list[Encoded], teacher: Teacher | None
) -> dict[str, float]:
    """Reference and video tokens of the tapped blocks against a teacher, at three noise levels.

    Without the teacher, which rank 0 has, nothing but the forward passes.
    """
    references, videos = ReferenceCollector(), VideoCollector(len(clips))
    size = run.config.eval.batch_size
    levels = [run.window.at(share) for share in PROBE_SIGMAS]
    jobs = [(i, sigma) for sigma in levels for i in range(len(clips))]
    with step_progress("probe", total=len(jobs)) as advance:
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            batch = eval_batch(run, clips, [i for i, _ in part], [sigma for _, sigma in part])
            taps = denoise(run, branch, batch, capture=True).taps
            numbers = [i for i, _ in part]
            if teacher is not None:
                references.add(taps, batch, [clips[i] for i in numbers], numbers, teacher)
                videos.add(taps, batch, teacher)
            advance(start + len(part), "")
    return {} if teacher is None else references.metrics() | videos.metrics()


def eval_batch(run: Run, clips: list[Encoded], numbers: list[int], sigma: list[float]) -> Batch:
    """The clips at these places, with all their conditions.

    A clip's noise depends on its place and noise level alone.
    """
    batch_clips = [clips[i] for i in numbers]
    noise = [
        torch.randn(
            clip.latents_CTHW.shape,
            generator=generator(EVAL_SEED, "val-noise", i, round(level * 1000)),
        )
        for clip, i, level in zip(batch_clips, numbers, sigma, strict=True)
    ]
    keep = [(True, True)] * len(numbers)
    empty = run.val_clips.empty_text_LD
    return collate(batch_clips, noise, sigma, keep, empty).to(run.device)


def denoise(run: Run, branch: ReferenceBranch, batch: Batch, *, capture: bool) -> Output:
    """One forward pass on the batch's noisy clips."""
    noisy = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
    with run.autocast():
        return branch(
            noisy, batch.sigma_B * 1000, batch.text_BLD, batch.references, capture=capture
        )


def teacher_of(run: Run, alias: str) -> Teacher:
    """A teacher of the recipe: the one that the run aligns with, or else loaded now."""
    if alias in run.alignment.teachers:
        teacher = run.alignment.teachers[alias]
        assert isinstance(teacher, Teacher)  # `RunConfig`: nothing is measured against others
        return teacher
    is_kept = run.caches.values.keeps("teacher")
    return teacher_from(run.config.teachers[alias], device=run.device, load=not is_kept)
