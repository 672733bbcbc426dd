"""The plan of one run: what `alignlab plan` says of it, as plain values."""

from dataclasses import dataclass

from alignlab.config.run import RunConfig, check_coupled
from alignlab.distributed.sharding import num_shards
from alignlab.errors import UserError
from alignlab.models.experts import INDEX, check_index
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_encoders import EncoderCosts, encoder_costs
from alignlab.plan.fake_run import AVERAGE, STAGE1, TEACHER, TRANSFORMER
from alignlab.plan.fake_step import FakeStep, fake_step
from alignlab.plan.parts import BACKWARD, RECOMPUTATION
from alignlab.plan.sizes import (
    CheckpointSizes,
    ClipBytes,
    Phase,
    checkpoint_sizes,
    clip_bytes,
    phases,
)
from alignlab.training.aligned_samples import check_recipe

FORWARD, BACK, AGAIN = "transformer, forward", "transformer, backward", "recomputation"
TEACHERS, VAE, TEXT = "teachers", "autoencoder", "text encoder"


@dataclass(frozen=True)
class RunPlan:
    """What a training costs: a run, or a Stage 1 training.

    Args:
        samples: of a micro-batch, on each GPU.
        micro_batches: of a step, on each GPU.
        gpus: that train the run together.
        step: what a micro-batch multiplies and a step holds.
        encoders: what the frozen encoders of a run cost.
        clip: bytes of a clip.
        checkpoint: bytes of checkpoints.
        phases: peaks of a GPU's memory, the highest first.
        step_flops: of an optimizer step, all GPUs together, by part. What the dataset cache keeps
            is not among them.
        clip_flops: by part, of what is computed once for each clip and then kept.
        is_sharded: whether each GPU holds a part of the weights.
    """

    samples: int
    micro_batches: int
    gpus: int
    step: FakeStep
    encoders: EncoderCosts | None
    clip: ClipBytes
    checkpoint: CheckpointSizes
    phases: list[Phase]
    step_flops: dict[str, int]
    clip_flops: dict[str, int]
    is_sharded: bool = False

    @property
    def blocks(self) -> int:
        """Of the transformer."""
        return self.step.blocks

    @property
    def peak(self) -> Phase:
        """The most that a GPU holds."""
        return self.phases[0]


def plan_run(
    config: RunConfig,
    architectures: Architectures,
    *,
    gpus: int = 1,
    encoders: EncoderCosts | None = None,
) -> RunPlan:
    """Finds what a run costs.

    Args:
        config: of the run.
        architectures: where settings of models are.
        gpus: that train it together.
        encoders: what the encoders cost, if it is known already.

    Raises:
        UserError: the run could not be trained so, or a model's settings are nowhere.
    """
    _check(config, architectures, gpus)
    optim = config.optim
    samples, left = divmod(optim.batch_size, optim.accumulate * gpus)
    if left or not samples:
        fix = f"set optim.accumulate, such as {optim.batch_size // gpus}"
        if optim.batch_size % gpus:
            fix = f"set optim.batch_size to a multiple of {gpus} GPUs"
        raise UserError(
            f"optim.batch_size: {optim.batch_size} is no multiple of optim.accumulate times "
            f"GPUs, {optim.accumulate} x {gpus}: {fix}"
        )
    is_sharded = num_shards(config.model, gpus) > 1
    encoders = encoders or encoder_costs(config, architectures)
    step = fake_step(config, architectures, samples=samples, in_shards=is_sharded)
    live, kept = _encoding(config, encoders, step)
    per_step = {part: count * optim.accumulate * gpus for part, count in grouped(step).items()}
    for part, count in live.items():
        per_step[part] = per_step.get(part, 0) + count * optim.batch_size
    return RunPlan(
        samples=samples,
        micro_batches=optim.accumulate,
        gpus=gpus,
        step=step,
        encoders=encoders,
        clip=clip_bytes(config, encoders, step),
        checkpoint=checkpoint_sizes(config, step),
        phases=phases(config, encoders, step, gpus),
        step_flops={part: count for part, count in per_step.items() if count},
        clip_flops=kept,
        is_sharded=is_sharded,
    )


def _check(config: RunConfig, architectures: Architectures, gpus: int) -> None:
    """Refuses what a training refuses before it reads weights."""
    check_coupled(config.objectives, gpus)
    folder = architectures.pipeline(config.model.path)
    if (folder / INDEX).is_file():
        check_index(str(folder), config.model.expert)
    model = config.model.model_copy(update={"path": str(folder)})
    check_recipe(config.model_copy(update={"model": model}))


def grouped(step: FakeStep) -> dict[str, int]:
    """FLOPs of a micro-batch by the parts that are reported."""
    found: dict[str, int] = {}
    for part, count in step.flops.items():
        base = part.removesuffix(BACKWARD)
        name = base
        if base == TRANSFORMER:
            name = BACK if part.endswith(BACKWARD) else FORWARD
        elif part == RECOMPUTATION:
            name = AGAIN
        elif base == TEACHER:
            name = TEACHERS
        elif base in (AVERAGE, STAGE1):
            name = base
        elif base == "rest":
            name = "losses"
        found[name] = found.get(name, 0) + count
    return found


def _encoding(
    config: RunConfig, encoders: EncoderCosts, step: FakeStep
) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of a clip's encoding: at every step, and once where the dataset cache keeps it."""
    cache = config.data.cache
    is_on, references = cache.mode != "off", config.data.references[1]
    video = encoders.clip.flops + references * encoders.reference.flops
    teachers = sum(teacher.flops for teacher in step.teachers)
    every: dict[str, int] = {}
    once: dict[str, int] = {}
    (once if is_on and cache.latents else every)[VAE] = video
    (once if is_on and cache.texts else every)[TEXT] = encoders.text.caption.flops
    if is_on and cache.teachers:
        once[TEACHERS] = teachers  # at every step they are part of it
    return every, {part: count for part, count in once.items() if count}
