"""A training loop that is not alignlab's, on the clips of a run's batch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from alignlab import Alignment, Clips
from alignlab.training.batches import Batch
from alignlab.training.step_terms import Aligned


def own_transformer(wan: Path) -> WanTransformer3DModel:
    """The transformer as a script of one's own loads it."""
    return WanTransformer3DModel.from_pretrained(wan / "transformer")


def clips_of(batch: Batch, **changes: Any) -> Clips:
    """All that a batch shows, as a loop of one's own has it; `changes` replace fields."""
    fields: dict[str, Any] = {
        "sigma_B": batch.sigma_B,
        "latent_shape": batch.latents_BCTHW.shape[2:],
        "frames_BTHWC": torch.stack([clip.sample.video_THWC for clip in batch.clips]),
        "references": [
            clip.pixels.images_KHWC if len(kept) else None
            for clip, kept in zip(batch.clips, batch.references, strict=True)
        ],
        "names": batch.names,
        "reference_masks": batch.reference_masks,
        "masks_BTHW": torch.stack([m.any(0) for m in batch.masks if m is not None]),
        "text_BLD": batch.caption_BLD,
        "latents_BCTHW": batch.latents_BCTHW,
        "step_sigma_S": batch.step_sigma_S,
    }
    return Clips(**(fields | changes))


def noisy_sequences(batch: Batch, *, first: bool = False) -> Tensor:
    """Noisy video latents and reference latents after (or before) them, (B, C, T + K, H, W)."""
    sigma = batch.sigma_B.view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * batch.latents_BCTHW + sigma * batch.noise_BCTHW
    references = torch.stack(batch.references).transpose(1, 2)
    return torch.cat([references, noisy] if first else [noisy, references], dim=2)


def predicted(transformer: nn.Module, batch: Batch, **where: bool) -> Tensor:
    """The forward pass of a script: reference latents are appended by hand."""
    output: Tensor = transformer(
        hidden_states=noisy_sequences(batch, **where),
        timestep=batch.sigma_B * 1000,
        encoder_hidden_states=batch.text_BLD,
        return_dict=False,
    )[0]
    return output[:, :, : batch.latents_BCTHW.shape[2]]


def flow_of(velocity: Tensor, batch: Batch) -> Tensor:
    """Flow loss of each sample."""
    target = batch.noise_BCTHW - batch.latents_BCTHW
    return (velocity - target).square().flatten(1).mean(1)


def own_step(
    transformer: nn.Module, alignment: Alignment, batch: Batch, step: int = 0, **changes: Any
) -> tuple[Tensor, Aligned]:
    """Loss of a step, and what the objectives gave."""
    with alignment.recording():
        velocity = predicted(transformer, batch)
    aligned: Aligned = alignment(clips_of(batch, **changes), step)
    return (flow_of(velocity, batch) + aligned.loss_B).mean(), aligned


def gradients(*parts: tuple[str, nn.Module]) -> dict[str, Tensor]:
    """Of all parameters that have one."""

    def named() -> Iterator[tuple[str, Tensor]]:
        for part, module in parts:
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    yield f"{part}.{name}", parameter.grad

    return dict(named())


def unequal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors of which not every bit is the same."""
    names = one.keys() | other.keys()
    return sorted(
        n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])
    )
