"""Encodes clips into training batches: latents, text embeddings, reference latents.

Everything that is drawn here has an address `(seed, purpose, step, sample)`, so the same step of
two variants sees the same clips, noise levels, noise and dropped conditions.
Shape letters: B batch, C channels, T, H, W of latents or pixels, K references, L text tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.config.parts import FlowConfig
from alignlab.data.sample import ClipDataset, Sample
from alignlab.errors import UserError
from alignlab.models.wan import Wan
from alignlab.randomness import generator
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.flow_matching import draw_sigma


@dataclass(frozen=True)
class Encoded:
    """One clip after the frozen encoders, on the CPU.

    `shows_reference` says whether one of its references is not blank.
    """

    sample: Sample
    latents_CTHW: Tensor
    text_LD: Tensor
    references_KCHW: Tensor
    shows_reference: bool


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs, on the training device.

    `references`, `reference_images` and `reference_masks` hold one tensor per sample, with zero
    rows where the references were dropped or the clip has none. `caption_BLD` is the text before
    dropout. `masks` are those of each clip's entities, bool `(E, T, H, W)`, or None if unknown.
    Both kinds of masks stay on the CPU: few objectives read them. `referenced_B`, bool on the CPU,
    says which samples keep a reference that shows something.
    """

    latents_BCTHW: Tensor
    noise_BCTHW: Tensor
    sigma_B: Tensor
    text_BLD: Tensor
    caption_BLD: Tensor
    references: list[Tensor]
    reference_images: list[Tensor]
    reference_masks: list[Tensor]
    video_BTHWC: Tensor
    names: list[list[str]]
    masks: list[Tensor | None]
    referenced_B: Tensor


class ClipEncoder:
    """Encodes clips one at a time (a clip's latents never depend on its neighbours).

    A clip that an encoder makes anything but finite values of is a UserError.

    Args:
        wan: the frozen encoders.
        dataset: where clips come from.
        memory: encoded clips of this data set and these encoders, from earlier runs or empty.
    """

    def __init__(self, wan: Wan, dataset: ClipDataset, memory: ClipMemory[Encoded]) -> None:
        self._wan = wan
        self._dataset = dataset
        self._memory = memory
        self.empty_text_LD = wan.encode_text([""])[0].cpu()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Encoded:
        kept = self._memory.get(index)
        if kept is not None:
            return kept
        sample = self._dataset[index]
        latents = self._wan.encode_video(sample.video_THWC)
        references = [self._wan.encode_image(r.image_HWC) for r in sample.references]
        encoded = Encoded(
            sample,
            latents.cpu(),
            self._wan.encode_text([sample.caption])[0].cpu(),
            torch.stack(references).cpu() if references else _no_references(latents),
            _shows_reference(sample),
        )
        self._check_finite(encoded)
        self._memory.put(index, encoded)
        return encoded

    def share_with_references(self) -> float:
        """Share of the clips that have a reference."""
        return self._dataset.share_with_references()

    def _check_finite(self, encoded: Encoded) -> None:
        parts = {
            "video by vae": encoded.latents_CTHW,
            "caption by text_encoder": encoded.text_LD,
            "references by vae": encoded.references_KCHW,
        }
        for what, values in parts.items():
            if not values.isfinite().all():
                raise UserError(
                    f"{encoded.sample.key}: encoding its {what} gives values that are not finite: "
                    f"look at {self._wan.folder} (model.path), or try model.precision=fp32"
                )


def training_batch(
    clips: ClipEncoder,
    flow: FlowConfig,
    *,
    seed: int,
    step: int,
    samples: range,
    device: torch.device,
) -> Batch:
    """The samples `samples` of a step's global batch.

    Args:
        clips: the training split.
        flow: noise level distribution and dropout probabilities.
        seed: the run's seed.
        step: optimizer step, from 0.
        samples: positions inside the step's batch; which rank or micro-batch handles
            a position does not change what is drawn for it.
        device: where the batch goes.
    """
    encoded, noise, sigma, keep = [], [], [], []
    for sample in samples:
        index = int(torch.randint(len(clips), (), generator=generator(seed, "clip", step, sample)))
        encoded.append(clips[index])
        rng = generator(seed, "noise", step, sample)
        noise.append(torch.randn(encoded[-1].latents_CTHW.shape, generator=rng))
        sigma.append(draw_sigma(flow, generator(seed, "sigma", step, sample)))
        keep.append(_draw_kept(flow, generator(seed, "dropout", step, sample)))
    return collate(encoded, noise, sigma, keep, clips.empty_text_LD, device)


def collate(
    encoded: list[Encoded],
    noise: list[Tensor],
    sigma: list[float],
    keep: list[tuple[bool, bool]],
    empty_text_LD: Tensor,
    device: torch.device,
) -> Batch:
    """Stacks encoded clips; `keep` says of each whether its text and its references stay."""
    rows = list(zip(encoded, keep, strict=True))
    references = [e.references_KCHW if refs else e.references_KCHW[:0] for e, (_, refs) in rows]
    images = [
        reference_images(e.sample)[: len(r)] for e, r in zip(encoded, references, strict=True)
    ]
    names = [[r.name for r in e.sample.references] if refs else [] for e, (_, refs) in rows]
    return Batch(
        latents_BCTHW=torch.stack([e.latents_CTHW for e in encoded]).to(device),
        noise_BCTHW=torch.stack(noise).to(device),
        sigma_B=torch.tensor(sigma, dtype=torch.float32, device=device),
        text_BLD=torch.stack([e.text_LD if text else empty_text_LD for e, (text, _) in rows]).to(
            device
        ),
        caption_BLD=torch.stack([e.text_LD for e in encoded]).to(device),
        references=[r.to(device) for r in references],
        reference_images=[i.to(device) for i in images],
        reference_masks=[
            _reference_masks(e.sample)[: len(r)] for e, r in zip(encoded, references, strict=True)
        ],
        video_BTHWC=torch.stack([e.sample.video_THWC for e in encoded]).to(device),
        names=names,
        masks=[e.sample.masks_ETHW for e in encoded],
        referenced_B=torch.tensor([refs and e.shows_reference for e, (_, refs) in rows]),
    )


def _shows_reference(sample: Sample) -> bool:
    """Whether one of the references is not blank."""
    return not all(is_blank(r.image_HWC, r.mask_HW) for r in sample.references)


def is_blank(image_HWC: Tensor, mask_HW: Tensor) -> bool:
    """Whether a reference shows nothing: no subject, or a whole picture of one colour.

    A picture without transparency is all subject: a rectangle as wide or as high as the frame. One
    that is smaller in both is a subject by itself, even of one colour.
    """
    pixels_NC = image_HWC[mask_HW]
    if not len(pixels_NC) or bool((image_HWC == image_HWC[0, 0]).all()):
        return True
    rows, columns = mask_HW.any(1), mask_HW.any(0)
    is_rectangle = len(pixels_NC) == int(rows.sum()) * int(columns.sum())
    is_picture = is_rectangle and bool(rows.all() or columns.all())
    return is_picture and bool((pixels_NC == pixels_NC[0]).all())


def reference_images(sample: Sample) -> Tensor:
    """uint8 `(K, H, W, C)`, K may be 0."""
    if not sample.references:
        return sample.video_THWC[:0]
    return torch.stack([r.image_HWC for r in sample.references])


def _reference_masks(sample: Sample) -> Tensor:
    """bool `(K, H, W)`, K may be 0."""
    if not sample.references:
        return torch.zeros(0, *sample.video_THWC.shape[1:3], dtype=torch.bool)
    return torch.stack([r.mask_HW for r in sample.references])


def _draw_kept(flow: FlowConfig, rng: torch.Generator) -> tuple[bool, bool]:
    """Whether text and references are kept: one draw decides among text, references, both."""
    u = float(torch.rand((), generator=rng, dtype=torch.float64))
    if u < flow.text_dropout:
        return False, True
    if u < flow.text_dropout + flow.reference_dropout:
        return True, False
    if u < flow.text_dropout + flow.reference_dropout + flow.both_dropout:
        return False, False
    return True, True


def _no_references(latents_CTHW: Tensor) -> Tensor:
    channels, _, height, width = latents_CTHW.shape
    return torch.empty(0, channels, height, width)
