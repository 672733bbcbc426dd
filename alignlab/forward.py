"""The forward pass that a training step takes its losses from.

Shape letters: B batch.
"""

from torch import Tensor

from alignlab.training.alignment import Aligned
from alignlab.training.batches import Batch
from alignlab.training.flow_matching import flow_loss, interpolate
from alignlab.training.setup import Run


def forward(run: Run, batch: Batch) -> tuple[Tensor, Aligned]:
    """Flow loss of every sample, (B,) and not yet weighted, and what the objectives find.

    `run.branch` must have been entered. Nothing of `run` changes.
    """
    noisy = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
    with run.accelerator.autocast():
        out = run.branch(noisy, batch.sigma_B * 1000, batch.text_BLD, batch.references)
        # projectors run as the transformer does; kernels and frozen networks leave autocast
        aligned: Aligned = run.alignment(out.taps, batch, run.state.step)
    return flow_loss(out.velocity_BCTHW, batch.latents_BCTHW, batch.noise_BCTHW), aligned
