"""What the harness costs: one training step of plain fine-tuning against a bare loop.

Both sides run in one process, interleaved, on equal models and the same clips; the order within a
pair alternates. Reported: medians and the median of the paired ratios.
"""

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.environment import describe_environment
from alignlab.errors import UserError
from alignlab.experiments.compare.measure import seconds_of
from alignlab.progress import step_progress
from alignlab.runs.atomic_files import write_text
from alignlab.train import RunTrainer
from alignlab.training.setup import Run, build_run

WARMUP_PAIRS = 3


@dataclass(frozen=True)
class Overhead:
    """Seconds per step, and the ratio harness / bare."""

    harness_s: float
    bare_s: float
    ratio: float
    pairs: int


def measure_overhead(config: RunConfig, *, pairs: int = 40) -> Overhead:
    """Times `Trainer.step` against a bare forward + backward + AdamW step.

    The bare side gets its batch for nothing (latents, noise and references ready in memory); the
    harness draws and assembles it from cached clips, which is part of what it costs.

    Args:
        config: a run in which both sides do the same work in one forward call: no objectives,
            equally many references in all clips, no dropout, text seen by all tokens.
        pairs: timed pairs, after three that are not counted.

    Raises:
        UserError: the recipe does not make both sides comparable.
    """
    _check_comparable(config)
    run = build_run(config)
    trainer, bare = RunTrainer(run), bare_step(run)
    times: list[tuple[float, float]] = []
    with run.branch, step_progress("overhead", total=pairs + WARMUP_PAIRS) as advance:
        for pair in range(pairs + WARMUP_PAIRS):
            (batch,) = trainer.micro_batches()  # also fills the cache, so that neither side encodes
            noise, sigma = batch.noise_BCTHW, batch.sigma_B.view(-1, 1, 1, 1, 1)
            noisy = (1 - sigma) * batch.latents_BCTHW + sigma * noise
            references = torch.stack(batch.references).transpose(1, 2)
            inputs = (torch.cat([noisy, references], dim=2), batch.sigma_B * 1000, batch.text_BLD)
            target = noise - batch.latents_BCTHW
            sides: list[Callable[[], object]] = [
                lambda: trainer.step(trainer.micro_batches()),
                partial(bare, inputs, target),
            ]
            seconds = [0.0, 0.0]
            for side in (0, 1) if pair % 2 else (1, 0):
                seconds[side] = seconds_of(sides[side], run.device)
            times.append((seconds[0], seconds[1]))
            advance(pair + 1, "")
    kept = times[WARMUP_PAIRS:]
    return Overhead(
        harness_s=statistics.median(h for h, _ in kept),
        bare_s=statistics.median(b for _, b in kept),
        ratio=statistics.median(h / b for h, b in kept),
        pairs=pairs,
    )


def _check_comparable(config: RunConfig) -> None:
    low, high = config.data.references
    flow = config.flow
    wanted = {
        "objectives": not config.objectives,
        "data.references": low == high,
        "flow.text_dropout, reference_dropout, both_dropout": not (
            flow.text_dropout + flow.reference_dropout + flow.both_dropout
        ),
        "model.text_to_references": config.model.text_to_references,
        "model.train": config.model.train == "full",
        "optim.accumulate": config.optim.accumulate == 1,
        "optim.ema": config.optim.ema is None,
    }
    for setting, fits in wanted.items():
        if not fits:
            raise UserError(
                f"{setting}: the bare loop would do other work; measure the overhead with the "
                "settings of the recipe `overhead`"
            )


def bare_step(run: Run) -> Callable[[tuple[Tensor, Tensor, Tensor], Tensor], None]:
    """The loop that anyone would write: a copy of the model, mean squared error, AdamW."""
    model = copy.deepcopy(run.wan.transformer)
    optim = run.config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
    )

    def step(inputs: tuple[Tensor, Tensor, Tensor], target: Tensor) -> None:
        latents, timesteps, text = inputs
        with run.autocast():
            out = model(latents, timesteps, text, return_dict=False)[0]
        F.mse_loss(out[:, :, : target.shape[2]].float(), target).backward()
        if optim.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def write_overhead(overhead: Overhead, out: Path) -> None:
    """Keeps the figures with the environment that they belong to."""
    content = asdict(overhead) | {"environment": describe_environment()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(content, indent=1) + "\n")
