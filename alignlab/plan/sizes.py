"""Bytes on disk and on the GPU of a run, of what `fake_step` and `encoder_costs` found."""

from collections.abc import Iterable
from dataclasses import dataclass

from alignlab.config.data import CacheConfig
from alignlab.config.parts import TrainingConfig
from alignlab.config.run import RunConfig
from alignlab.distributed.ranks import BUCKET
from alignlab.distributed.sharding import num_shards
from alignlab.plan.fake_encoders import EncoderCosts
from alignlab.plan.fake_step import (
    EMA,
    GRADIENTS,
    OPTIMIZER,
    SHARED,
    TEACHERS,
    WEIGHTS,
    FakeStep,
    TeacherCost,
)
from alignlab.units import GIB

CUDA_CONTEXT = GIB
"""What a process takes of a GPU before it makes a tensor, about."""
FP32 = 4


@dataclass(frozen=True)
class CheckpointSizes:
    """Bytes of the checkpoints of a run.

    Args:
        one: a checkpoint, its optimizer included.
        optimizer: of it, the moments.
        training: kept during the training, the one that is being written included.
        finished: left of them afterwards.
    """

    one: int
    optimizer: int
    training: int
    finished: int


def checkpoint_sizes(config: TrainingConfig, step: FakeStep) -> CheckpointSizes:
    """Sizes of the checkpoints that `checkpoint` has a run keep."""
    optimizer = step.standing.get(OPTIMIZER, 0)
    weights = step.saved + step.standing.get(EMA, 0)
    one, count = weights + optimizer, num_kept(config, config.checkpoint.keep)
    copies = config.steps // (config.checkpoint.weights_every or config.steps + 1) * weights
    finished = {
        "all": count * one + copies,
        "weights": num_kept(config, 1) * weights + copies,
        "none": 0,
    }
    return CheckpointSizes(
        one, optimizer, (count + 1) * one + copies, finished[config.checkpoint.keep_finished]
    )


def num_kept(config: TrainingConfig, newest: int) -> int:
    """How many checkpoints stay: so many of the newest, and those of `checkpoint.keep_every`."""
    settings = config.checkpoint
    written = [*range(settings.every, config.steps, settings.every), config.steps]
    multiple = settings.keep_every or config.steps + 1
    older = [step for step in written[:-newest] if step % multiple == 0]
    return len(written[-newest:]) + len(older)


@dataclass(frozen=True)
class ClipBytes:
    """Bytes of a clip.

    Args:
        pixels: of its decoded frames and references.
        cached: what the dataset cache keeps of it, by what it is; 0 where that is not kept.
    """

    pixels: int
    cached: dict[str, int]


def clip_bytes(config: RunConfig, encoders: EncoderCosts, step: FakeStep) -> ClipBytes:
    """Sizes of a clip. What a model in bf16 gives is kept in half the bytes of fp32."""
    cache, (height, width) = config.data.cache, config.data.size
    is_on, half = cache.mode != "off", config.model.precision == "bf16"
    frames = config.data.frames + config.data.references[1]
    keeps_latents = is_on and cache.latents
    cached = {
        "latents": keeps_latents * encoders.latents * FP32,
        "references": keeps_latents * encoders.references * FP32,
        "text": (is_on and cache.texts) * encoders.text.numbers * (FP32 // 2 if half else FP32),
    }
    cached |= features_bytes(cache, step.teachers)
    return ClipBytes(frames * height * width * 3, cached)


def features_bytes(cache: CacheConfig, teachers: Iterable[TeacherCost]) -> dict[str, int]:
    """Bytes of a clip's features in the dataset cache by teacher; 0 where they are not kept."""
    found = {}
    for teacher in teachers:
        numbers = 1
        for side in teacher.shape:
            numbers *= side
        size = numbers * (2 if teacher.is_half or cache.dtype == "bf16" else FP32)
        if cache.dtype in ("fp8", "int8"):
            size = numbers + numbers // teacher.shape[-1] * FP32
        name = f"teacher {teacher.alias}, {teacher.kind}"
        found[name] = (cache.mode != "off" and cache.teachers) * size
    return found


@dataclass(frozen=True)
class Phase:
    """A time at which memory has a peak.

    Args:
        name: of what runs then.
        total: bytes.
        parts: bytes by what they are.
        others: at other times of it, which may have the peak if GPUs share.
    """

    name: str
    total: int
    parts: dict[str, int]
    others: tuple[dict[str, int], ...] = ()


def phases(config: RunConfig, encoders: EncoderCosts, step: FakeStep, gpus: int) -> list[Phase]:
    """Peaks of one GPU's memory, by time, the highest first.

    Args:
        config: of the run.
        encoders, step: what they cost.
        gpus: that train the run together.
    """
    cache, is_on = config.data.cache, config.data.cache.mode != "off"
    resident = {"CUDA context": CUDA_CONTEXT}
    if not (is_on and cache.texts) or config.model.text_encoder == "keep":
        if config.model.text_encoder != "cpu":
            resident["text encoder"] = encoders.text.weights
    vae_stays = not (is_on and cache.latents)
    if vae_stays:
        resident["autoencoder"] = encoders.vae
    cards = num_shards(config.model, gpus)
    standing = resident | {k: v for k, v in step.standing.items() if k in _STANDING}
    if config.optim.accumulate > 1:  # batches are made between micro-batches
        standing = standing | {GRADIENTS: step.gradients}
    making = {**standing, "autoencoder": encoders.vae, "encoding a clip": encoders.clip.memory}
    times = [resident | peak.by_label for peak in step.peaks]
    found = [phase_at("step", *times)]
    if gpus > 1:
        flat = min(BUCKET, step.trained) * step.gradients // max(1, step.trained)
        if cards > 1:  # those of the transformer are averaged as they come
            flat = min(BUCKET, step.projectors) * FP32
        averaging = standing | {GRADIENTS: step.gradients, "averaging of gradients": flat}
        found.append(phase_at("averaging", averaging))
    if config.data.workers:
        # threads encode while a step runs
        beside = {k: making[k] for k in ("autoencoder", "encoding a clip")}
        both = [time | beside for time in times]
        found.append(phase_at("step, and encoding of the next clips", *both))
    found.append(phase_at("encoding of clips", making))
    for teacher in step.teachers:
        others = {k: v for k, v in standing.items() if k != TEACHERS}
        at_work = {TEACHERS: teacher.weights, "features": teacher.peak - teacher.weights}
        found.append(phase_at(f"features of teacher {teacher.alias}", others | at_work))
    text = standing | {
        "text encoder": encoders.text.weights,
        "captions": encoders.text.caption.memory,
    }
    if config.model.text_encoder != "cpu":
        if "text encoder" not in resident:  # captions are encoded before there is an optimizer
            text = {k: v for k, v in text.items() if k not in (OPTIMIZER, GRADIENTS)}
        found.append(phase_at("encoding of captions", text))
    if config.eval.generates:
        samples = {k: v for k, v in standing.items() if k != GRADIENTS}
        samples |= {"autoencoder": encoders.vae, "decoding a clip": encoders.decode.memory}
        if config.optim.ema is not None:  # the average stands where they were
            samples |= {ASIDE: step.gradients}
        found.append(phase_at("decoding of samples", samples))
    if config.optim.offload:  # the state of one tensor at a time is on the GPU
        found = [_without_state(phase) for phase in found]
    if cards > 1:
        whole = config.optim.accumulate > 1
        found = [sharded(p, step.blocks, cards, whole_gradients=whole) for p in found]
    return sorted(found, key=lambda phase: -phase.total)


ASIDE = "weights put aside"
GATHERED, GATHERED_BLOCKS = "gathered blocks", 2
"""Of weights in shards, so many blocks are whole at a time: one computes, one comes."""


def sharded(phase: Phase, blocks: int, cards: int, *, whole_gradients: bool) -> Phase:
    """What a phase takes of each of several GPUs that share a model (FSDP2).

    Arithmetic, not a measurement: weights, gradients, state and average are divided, and two blocks
    are whole at a time.

    Args:
        phase: of a GPU that holds all.
        blocks: of the transformer, which hold all but a few percent of the weights.
        cards: GPUs that share one.
        whole_gradients: of micro-batches before the last, which exchange none.
    """
    if cards == 1:
        return phase
    split = (SHARED | {ASIDE}) - ({GRADIENTS} if whole_gradients else set())
    gathered = {GATHERED: GATHERED_BLOCKS * phase.parts.get(WEIGHTS, 0) // blocks}
    times = (
        {k: v // cards if k in split else v for k, v in parts.items()} | gathered
        for parts in (phase.parts, *phase.others)
    )
    return max((phase_at(phase.name, parts) for parts in times), key=lambda one: one.total)


_STANDING = (WEIGHTS, OPTIMIZER, EMA, TEACHERS)


def _without_state(phase: Phase) -> Phase:
    times = (parts | {OPTIMIZER: 0} for parts in (phase.parts, *phase.others))
    return phase_at(phase.name, *times)


def phase_at(name: str, parts: dict[str, int], *others: dict[str, int]) -> Phase:
    """A phase of these bytes by part; see `Phase`."""
    kept = {part: size for part, size in parts.items() if size}
    return Phase(name, sum(kept.values()), kept, others)
