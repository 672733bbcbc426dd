"""The plan of a Stage 1 training, in the terms of a run's (`RunPlan`)."""

from alignlab.errors import UserError
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_encoders import TextCosts
from alignlab.plan.fake_stage1 import FakeStage1, fake_stage1
from alignlab.plan.fake_step import OPTIMIZER, TEACHERS, WEIGHTS
from alignlab.plan.run_plan import TEACHERS as TEACHERS_PART
from alignlab.plan.run_plan import TEXT, RunPlan, grouped
from alignlab.plan.sizes import (
    CUDA_CONTEXT,
    FP32,
    ClipBytes,
    Phase,
    checkpoint_sizes,
    features_bytes,
    phase_at,
)
from alignlab.stage1.config import Stage1Config


def plan_stage1(config: Stage1Config, architectures: Architectures, *, gpus: int = 1) -> RunPlan:
    """Finds what a Stage 1 training costs.

    Args:
        config: of the training.
        architectures: where settings of models are.
        gpus: that it is asked for on; it trains on one.

    Raises:
        UserError: several GPUs are asked for, the training could not be built, or a model's
            settings are nowhere.
    """
    if gpus > 1:
        raise UserError(f"a Stage 1 training has one process: {gpus} GPUs do not share it")
    fake = fake_stage1(config, architectures)
    live, kept = _encoding(config, fake)
    per_step = grouped(fake.step)
    for part, count in live.items():
        per_step[part] = per_step.get(part, 0) + count * config.optim.batch_size
    return RunPlan(
        samples=config.optim.batch_size,
        micro_batches=1,
        gpus=1,
        step=fake.step,
        encoders=None,
        clip=_clip_bytes(config, fake),
        checkpoint=checkpoint_sizes(config, fake.step),
        phases=_phases(config, fake),
        step_flops={part: count for part, count in per_step.items() if count},
        clip_flops=kept,
    )


def _encoding(config: Stage1Config, fake: FakeStage1) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of a clip's encoding: at every step, and once where the dataset cache keeps it."""
    cache, is_on = config.data.cache, config.data.cache.mode != "off"
    every: dict[str, int] = {}
    once: dict[str, int] = {}
    (once if is_on and cache.teachers else every)[TEACHERS_PART] = sum(
        teacher.flops for teacher in fake.step.teachers
    )
    if fake.text is not None:
        text = fake.texts * fake.text.caption.flops
        (once if is_on and cache.texts else every)[TEXT] = text
    return every, once


def _clip_bytes(config: Stage1Config, fake: FakeStage1) -> ClipBytes:
    cache, (height, width) = config.data.cache, config.data.size
    cached: dict[str, int] = {}
    if fake.text is not None:
        assert config.text_model is not None  # of a task that reads text
        size = FP32 // 2 if config.text_model.precision == "bf16" else FP32
        is_kept = cache.mode != "off" and cache.texts
        cached["text"] = is_kept * fake.texts * fake.text.numbers * size
    cached |= features_bytes(cache, fake.step.teachers)
    return ClipBytes(config.data.frames * height * width * 3, cached)


def _phases(config: Stage1Config, fake: FakeStage1) -> list[Phase]:
    """Peaks of the GPU's memory, by time, the highest first."""
    step, text = fake.step, _text_on_gpu(config, fake)
    resident = {"CUDA context": CUDA_CONTEXT}
    if text is not None and not _frees_text_encoder(config):
        resident["text encoder"] = text.weights
    standing = resident | {k: step.standing[k] for k in _STANDING if k in step.standing}
    times = [resident | peak.by_label for peak in step.peaks]
    found = [phase_at("step", *times)]
    for teacher in step.teachers:
        at_work = {TEACHERS: teacher.weights, "features": teacher.peak - teacher.weights}
        found.append(phase_at(f"features of teacher {teacher.alias}", standing | at_work))
        if config.data.workers:  # threads encode while a step runs
            both = [time | at_work for time in times]
            found.append(phase_at("step, and features of the next clips", *both))
    if text is not None:
        before = standing
        if _frees_text_encoder(config):  # before there is an optimizer's state
            before = {k: v for k, v in standing.items() if k != OPTIMIZER}
        captions = {"text encoder": text.weights, "captions": text.caption.memory}
        found.append(phase_at("encoding of captions", before | captions))
    return sorted(found, key=lambda phase: -phase.total)


_STANDING = (WEIGHTS, OPTIMIZER, TEACHERS)


def _text_on_gpu(config: Stage1Config, fake: FakeStage1) -> TextCosts | None:
    """The text encoder, if there is one and it is not on the CPU."""
    model = config.text_model
    return None if model is None or model.text_encoder == "cpu" else fake.text


def _frees_text_encoder(config: Stage1Config) -> bool:
    """Whether all texts are encoded before the first step."""
    cache, model = config.data.cache, config.text_model
    keeps = model is not None and model.text_encoder == "keep"
    return cache.mode != "off" and cache.texts and not keeps
