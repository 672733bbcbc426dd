"""How much of a training step the alignment loss takes, by implementation of its kernel.

A step of a Wan transformer with random weights on random latents, text embeddings, reference
latents and teacher features: what is timed does not depend on their values. The teacher's own
forward pass is left out. Sides (plain fine-tuning, and RefAlign with each implementation) run
interleaved in one process.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from alignlab.config.data import unknown_name
from alignlab.environment import describe_environment
from alignlab.errors import UserError
from alignlab.experiments.bench.wan_step import SIZES as SIZES
from alignlab.experiments.bench.wan_step import ModelSize, WanStep
from alignlab.experiments.compare.measure import seconds_of
from alignlab.kernels.pull_push import OPERATION
from alignlab.progress import step_progress
from alignlab.runs.atomic_files import write_text

WARMUP_STEPS = 2


@dataclass(frozen=True)
class Share:
    """Medians over steps: seconds of a step, and the part of it that the loss added."""

    side: str
    step_s: float
    share: float
    parameters: int


def check_impls(names: Sequence[str]) -> list[str]:
    """Refuses what is no implementation of `pull_push`; gives the names, each once.

    Raises:
        UserError: one line.
    """
    for name in names:
        try:
            OPERATION.full_name(name)
        except KeyError:
            hint = unknown_name("implementation", name, OPERATION.names())
            raise UserError(f"--impl {name}: {hint}") from None
    return list(dict.fromkeys(names))


def measure_share(
    size: ModelSize,
    impls: Sequence[str],
    *,
    references: int = 3,
    steps: int = 10,
    device: torch.device,
) -> list[Share]:
    """Times forward, backward and AdamW of one clip with and without RefAlign.

    Args:
        size: see `SIZES`.
        impls: implementations of `alignlab.kernels.pull_push` to time.
        references: K, images beside the clip; their tokens are as many as a latent frame's.
        steps: timed steps of each side, after two that are not counted.
        device: where; on CUDA the forward pass runs in bf16, as a training run would.

    Raises:
        ValueError: an implementation cannot run here.
    """
    step = WanStep(size, references, device)
    sides: dict[str, Callable[[], object]] = {"none": partial(step, None)}
    sides |= {impl: partial(step, step.refalign(impl)) for impl in impls}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with step_progress("share", total=steps + WARMUP_STEPS) as advance:
        for number in range(steps + WARMUP_STEPS):
            names = list(sides)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(seconds_of(sides[name], device))
            advance(number + 1, "")
    kept = {name: times[WARMUP_STEPS:] for name, times in seconds.items()}
    return [
        Share(
            name,
            statistics.median(times),
            statistics.median((t - n) / t for t, n in zip(times, kept["none"], strict=True)),
            step.parameters,
        )
        for name, times in kept.items()
    ]


def write_share(shares: Sequence[Share], size: str, out: Path) -> None:
    """Keeps the figures with the environment that they belong to."""
    sides = [asdict(share) for share in shares]
    content = {"size": size, "sides": sides, "environment": describe_environment()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(content, indent=1) + "\n")
