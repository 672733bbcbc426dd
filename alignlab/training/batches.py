"""Encodes clips into training batches: latents, text embeddings, reference latents.

Everything that is drawn here has an address `(seed, purpose, step, sample)`, so the same step of
two variants sees the same clips, noise levels, noise and dropped conditions.
Shape letters: B batch, C channels, T, H, W of latents or pixels, K references, L text tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from alignlab.config.parts import FlowConfig
from alignlab.data.sample import ClipDataset, Reference, Sample
from alignlab.dataset_cache.clip_keys import reference_key, text_key, video_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.key import CacheKey
from alignlab.kernels.host_copy import to_device
from alignlab.models.experts import WHOLE, Window
from alignlab.models.frozen_parts import FrozenParts
from alignlab.randomness import generator
from alignlab.training.centring import centre_clips, centre_key, kept_centre
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.encoded import ClipPixels, Encoded, FeatureRead, feature_key
from alignlab.training.flow_matching import draw_sigma
from alignlab.training.kept_text import kept_text, not_finite
from alignlab.training.prefetch import check_wanted
from alignlab.training.two_levels import SecondLevel, TwoLevels

ALL_DRAWN = 4
"""Clips drawn per train clip, from which on all are taken: 1 in 55 of them is then never drawn."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs; made on the CPU, and moved to the training device.

    `references` holds one tensor per sample, with zero rows where the references were dropped or
    the clip has none; `names` are those of the references that are left. `caption_BLD` is the text
    before dropout. `referenced_B`, bool on the CPU, says which samples keep a reference that shows
    something. `clips` are what the samples were made of: what reads pixels asks them, and so
    decodes nothing that nothing reads. `loaded` are features of teachers, by sample: None of
    references that were dropped. Others are asked of the clips. `cleaner_B` says how much less
    noise the student's average sees; or `second` says which tokens have another noise level.
    `step_sigma_S` are the noise levels of all samples of the step, those of other micro-batches and
    ranks included.
    """

    latents_BCTHW: Tensor
    noise_BCTHW: Tensor
    sigma_B: Tensor
    text_BLD: Tensor
    caption_BLD: Tensor
    references: list[Tensor]
    names: list[list[str]]
    referenced_B: Tensor
    clips: list[Encoded]
    loaded: dict[FeatureRead, list[Tensor | None]] = field(default_factory=dict)
    cleaner_B: Tensor | None = None
    step_sigma_S: Tensor | None = None
    second: SecondLevel | None = None

    def features(self, read: FeatureRead) -> list[Tensor | None]:
        """Features of a teacher, on the device: by sample, None if its references are dropped."""
        if read in self.loaded:
            return self.loaded[read]
        move = partial(to_device, device=self.sigma_B.device)
        return [_if_there(move, rows) for rows in self._made(read)]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; to a GPU it is copied without waiting, in turn with its work."""
        return self if device.type == "cpu" else self._changed(partial(to_device, device=device))

    def completed(
        self, reads: Sequence[FeatureRead], needs: AbstractSet[str], device: torch.device
    ) -> "Batch":
        """With all that a step reads of the clips, on the CPU.

        Args:
            reads: features of teachers; a teacher runs where they are not kept.
            needs: of the objectives: `masks` has the videos decoded, `foreground` the references.
            device: that it goes to; CUDA copies by itself what lies in pinned memory.
        """
        for clip, kept in zip(self.clips, self.references, strict=True):
            check_wanted()
            if "masks" in needs:
                clip.pixels.sample  # noqa: B018
            if "foreground" in needs and len(kept):
                clip.pixels.references  # noqa: B018
        self.load(reads)
        return self._changed(Tensor.pin_memory) if device.type == "cuda" else self

    def load(self, reads: Sequence[FeatureRead]) -> None:
        """Has features of teachers in `loaded`, on the CPU."""
        for read in reads:
            if read not in self.loaded:
                self.loaded[read] = [_if_there(Tensor.cpu, rows) for rows in self._made(read)]

    def _made(self, read: FeatureRead) -> list[Tensor | None]:
        """Features of a teacher, on the CPU or on its device."""
        found = []
        for clip, kept in zip(self.clips, self.references, strict=True):
            check_wanted()
            found.append(clip.features(read) if read.kind == "video" or len(kept) else None)
        return found

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            latents_BCTHW=change(self.latents_BCTHW),
            noise_BCTHW=change(self.noise_BCTHW),
            sigma_B=change(self.sigma_B),
            text_BLD=change(self.text_BLD),
            caption_BLD=change(self.caption_BLD),
            references=[change(latents_KCHW) for latents_KCHW in self.references],
            cleaner_B=_if_there(change, self.cleaner_B),
            step_sigma_S=_if_there(change, self.step_sigma_S),
            second=None if self.second is None else self.second.changed(change),
            loaded={
                read: [_if_there(change, rows) for rows in features]
                for read, features in self.loaded.items()
            },
        )

    @cached_property
    def reference_masks(self) -> list[Tensor]:
        """Where the subjects of the references of each sample are, bool `(K, H, W)`, on the CPU."""
        return [
            _masks(clip) if len(kept) else torch.zeros(0, 1, 1, dtype=torch.bool)
            for clip, kept in zip(self.clips, self.references, strict=True)
        ]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Those of each clip's entities, bool `(E, T, H, W)` on the CPU, or None if unknown."""
        return [clip.sample.masks_ETHW for clip in self.clips]

    @cached_property
    def undecided(self) -> list[Tensor | None]:
        """Pixels of each clip that are neither an entity's nor background; None: there are none."""
        return [clip.sample.undecided_THW for clip in self.clips]


class ClipEncoder:
    """Encodes clips one at a time (a clip's latents never depend on its neighbours).

    Threads may share one. A clip that an encoder makes anything but finite values of is a
    UserError.

    Args:
        frozen: the encoders.
        dataset: where clips come from.
        values: what is kept of earlier encodings.
        memory: encoded clips of this data set and these encoders, from earlier runs or empty.
    """

    def __init__(
        self,
        frozen: FrozenParts,
        dataset: ClipDataset,
        values: EncodedValues,
        memory: ClipMemory[Encoded],
    ) -> None:
        self._frozen = frozen
        self._dataset = dataset
        self._values = values
        self._memory = memory
        self._centres: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Encoded:
        kept = self._memory.get(index)
        if kept is not None:
            return kept
        pixels = ClipPixels(self._dataset, index, self._memory)
        with self._frozen.late_vae.held():
            latents_CTHW = self._latents(pixels)
            references_KCHW, shows_reference = self._references(pixels, latents_CTHW)
        encoded = Encoded(
            pixels,
            latents_CTHW,
            self.text(pixels.caption, where=pixels.key),
            references_KCHW,
            shows_reference,
            self._values,
            clips=self,
        )
        self._memory.put(index, encoded)
        return encoded

    def sample(self, index: int) -> Sample:
        """A clip before the encoders, decoded anew."""
        return self._dataset[index]

    @cached_property
    def empty_text_LD(self) -> Tensor:
        """The embedding of the empty prompt."""
        return self.text("", where="the empty prompt")

    def text(self, prompt: str, *, where: str) -> Tensor:
        """The embedding of a prompt, on the CPU, zero after its last token.

        Args:
            prompt: a caption or another text.
            where: what has it, for the message.
        """

        return kept_text(self._values, self._frozen.text, prompt, where)

    def captions(self, indices: Iterable[int]) -> dict[str, str]:
        """Captions of clips, each with the key of a clip that has it."""
        return {self._dataset.caption(i): self._dataset.key(i) for i in indices}

    def cache_keys(self, index: int, reads: Sequence[FeatureRead]) -> list[CacheKey]:
        """What is read of a clip, as the dataset cache names it; nothing is decoded.

        Args:
            index: of the clip.
            reads: features that are read of it.
        """
        pixels = ClipPixels(self._dataset, index)
        keys = [
            text_key(pixels.caption, self._frozen.text.parts),
            video_key(pixels.origin, self._frozen.vae_parts),
        ]
        if pixels.names:
            keys.append(reference_key(pixels.origin, self._frozen.vae_parts))
        keys += [feature_key(r, pixels) for r in reads if r.kind == "video" or pixels.names]
        return keys

    def centre_of(self, read: FeatureRead) -> Tensor:
        """Mean of a diffusion teacher's features over the first clips, (D,) on the CPU.

        Made, or read from the dataset cache, when it is first asked for.
        """
        name = read.teacher.identity
        if name not in self._centres:
            clips = centre_clips(self._dataset)
            self._centres[name] = kept_centre(self._values, read, clips, self.__getitem__)
        return self._centres[name]

    def keep_centre(self, read: FeatureRead, centre_D: Tensor) -> None:
        """Has `centre_of` give what another rank made."""
        self._centres[read.teacher.identity] = centre_D

    def centre_key(self, read: FeatureRead) -> CacheKey:
        """Names it in the dataset cache."""
        return centre_key(read, centre_clips(self._dataset), self._values.cache.dtype)

    @property
    def keeps_features(self) -> bool:
        """Whether features of teachers are kept, and so need no teacher twice."""
        return self._values.keeps("teacher")

    def share_with_references(self) -> float:
        """Share of the clips that have a reference."""
        return self._dataset.share_with_references()

    def _latents(self, pixels: ClipPixels) -> Tensor:
        def make() -> dict[str, Tensor]:
            return {"latents_CTHW": self._frozen.encode_video(pixels.sample.video_THWC).cpu()}

        values = self._values.get(
            "video",
            lambda: video_key(pixels.origin, self._frozen.vae_parts),
            make,
            lambda: not_finite(pixels.key, "video by vae", self._frozen.folder),
        )
        return values["latents_CTHW"]

    def _references(self, pixels: ClipPixels, latents_CTHW: Tensor) -> tuple[Tensor, bool]:
        """Latents of all references, and whether one of them shows something."""
        if not pixels.names:
            channels, _, height, width = latents_CTHW.shape
            return torch.empty(0, channels, height, width), False

        def make() -> dict[str, Tensor]:
            images = [reference.image_HWC for reference in pixels.references]
            latents_KCHW = torch.stack([self._frozen.encode_image(image) for image in images]).cpu()
            shows = torch.tensor(_shows_reference(pixels.references))
            return {"latents_KCHW": latents_KCHW, "shows": shows}

        values = self._values.get(
            "reference",
            lambda: reference_key(pixels.origin, self._frozen.vae_parts),
            make,
            lambda: not_finite(pixels.key, "references by vae", self._frozen.folder),
        )
        return values["latents_KCHW"], bool(values["shows"])


def drawn_clip(count: int, seed: int, step: int, sample: int) -> int:
    """Which of `count` clips a sample of a step is made of."""
    return int(torch.randint(count, (), generator=generator(seed, "clip", step, sample)))


def drawn_clips(count: int, seed: int, steps: range, samples: Sequence[int]) -> Iterable[int]:
    """Which of `count` clips these samples of steps are made of, each once, as they are drawn.

    All, where so much is drawn that hardly one is left out.
    """
    if len(steps) * len(samples) >= ALL_DRAWN * count:
        return range(count)
    draws = ((step, sample) for step in steps for sample in samples)
    return dict.fromkeys(drawn_clip(count, seed, *draw) for draw in draws)


def training_batch(
    clips: ClipEncoder,
    flow: FlowConfig,
    *,
    seed: int,
    step: int,
    samples: range,
    reads: Sequence[FeatureRead] = (),
    cleaner: float | None = None,
    whole: range | None = None,
    levels: TwoLevels | None = None,
    window: Window = WHOLE,
) -> Batch:
    """The samples `samples` of a step's global batch, on the CPU.

    Args:
        clips: the training split.
        flow: noise level distribution and dropout probabilities.
        seed: the run's seed.
        step: optimizer step, from 0.
        samples: positions inside the step's batch; which rank or micro-batch handles
            a position does not change what is drawn for it.
        reads: features of teachers that the step reads: loaded with the batch, if they are kept.
            Else a teacher runs when they are read, or in `Batch.completed`.
        cleaner: the most by which the noise level of the student's average lies below a sample's;
            None: nothing reads one.
        whole: all samples of the step, whose noise levels `step_sigma_S` is to hold; None: nothing
            reads them.
        levels: of samples that hold two noise levels; None: each holds one.
        window: where noise levels are drawn.
    """
    encoded, noise, sigma, keep = [], [], [], []
    for sample in samples:
        check_wanted()
        encoded.append(clips[drawn_clip(len(clips), seed, step, sample)])
        rng = generator(seed, "noise", step, sample)
        noise.append(torch.randn(encoded[-1].latents_CTHW.shape, generator=rng))
        sigma.append(draw_sigma(flow, generator(seed, "sigma", step, sample), window))
        keep.append(_draw_kept(flow, generator(seed, "dropout", step, sample)))
    batch = collate(encoded, noise, sigma, keep, clips.empty_text_LD)
    if cleaner is not None:
        draws = [torch.rand((), generator=generator(seed, "cleaner", step, n)) for n in samples]
        batch = replace(batch, cleaner_B=cleaner * torch.stack(draws))
    if whole is not None:
        drawn = [draw_sigma(flow, generator(seed, "sigma", step, n), window) for n in whole]
        batch = replace(batch, step_sigma_S=torch.tensor(drawn, dtype=torch.float32))
    if levels is not None:
        size = batch.latents_BCTHW.shape[2:]
        second = levels.drawn(flow, size, seed=seed, step=step, samples=samples, window=window)
        batch = replace(batch, second=second)
    if clips.keeps_features:
        batch.load(reads)
    return batch


def _if_there(change: Callable[[Tensor], Tensor], rows: Tensor | None) -> Tensor | None:
    return None if rows is None else change(rows)


def collate(
    encoded: list[Encoded],
    noise: list[Tensor],
    sigma: list[float],
    keep: list[tuple[bool, bool]],
    empty_text_LD: Tensor,
) -> Batch:
    """Stacks encoded clips on the CPU; `keep` says of each whether text and references stay."""
    rows = list(zip(encoded, keep, strict=True))
    references = [e.references_KCHW if refs else e.references_KCHW[:0] for e, (_, refs) in rows]
    return Batch(
        latents_BCTHW=torch.stack([e.latents_CTHW for e in encoded]),
        noise_BCTHW=torch.stack(noise),
        sigma_B=torch.tensor(sigma, dtype=torch.float32),
        text_BLD=torch.stack([e.text_LD if text else empty_text_LD for e, (text, _) in rows]),
        caption_BLD=torch.stack([e.text_LD for e in encoded]),
        references=references,
        names=[list(e.pixels.names) if refs else [] for e, (_, refs) in rows],
        referenced_B=torch.tensor([refs and e.shows_reference for e, (_, refs) in rows]),
        clips=list(encoded),
    )


def _shows_reference(references: Sequence[Reference]) -> bool:
    """Whether one of the references is not blank."""
    return not all(is_blank(r.image_HWC, r.mask_HW) for r in references)


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


def _masks(clip: Encoded) -> Tensor:
    """bool `(K, H, W)` of the references, K at least 1."""
    return torch.stack([reference.mask_HW for reference in clip.pixels.references])


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
