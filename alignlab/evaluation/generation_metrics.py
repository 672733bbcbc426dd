"""What one generated clip shows, held against its references, its caption and the real clip.

Each public function is the `measure` of a row in `metric_registry.py`: it takes a `GeneratedClip`
and gives the values that the clip adds to the metric, none where it cannot be measured there.
docs/metrics.md has every formula, and what each measure cannot tell. Shape letters: T frames, P
patches, D width, K references, E entities, H height, W width, C channels (RGB), N clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.data.sample import Reference, Sample
from alignlab.data.shapes.dataset import REFERENCE_RADIUS
from alignlab.data.shapes.detect import Regions, direction, find_subjects
from alignlab.evaluation.named_subjects import AttributeProbes, Recognised
from alignlab.losses.grids import covered_share
from alignlab.metrics import (
    colourfulness,
    frechet_distance,
    mean_lab,
    motion_amplitude,
    rms_contrast,
    temporal_flickering,
)
from alignlab.metrics.copy_paste import FrameSpectra, Template, best_match, subject_templates
from alignlab.teachers import Teacher
from alignlab.training.clip_memory import MadeOnce


@dataclass(frozen=True)
class Appearances:
    """How a clip's frames show the subject of one reference, to the teacher.

    Args:
        cosine_T: of cutout and reference, 0 in a frame that does not show the subject.
        confused_T: bool, of the frames that show it alone: the cutout is nearer to another
            reference of the clip. Empty where there is no other.
    """

    cosine_T: list[float]
    confused_T: list[bool]


@dataclass(frozen=True)
class GeneratedClip:
    """A clip, the sample it was generated for, and what several metrics need of it, computed once.

    Args:
        video_THWC: uint8 frames.
        sample: its conditions, and the real clip.
        teacher: whose features are compared; None leaves out what needs one.
        grid_HW: its patches on a frame or reference.
        subjects_by_colour: as the data set's settings say (`ClipsConfig`).
        probes: fitted attribute probes; None leaves out what needs them.
        of_sample: what depends on the sample, teacher and grid alone; other clips that are
            generated for it share it.
    """

    video_THWC: Tensor
    sample: Sample
    teacher: Teacher | None
    grid_HW: tuple[int, int]
    subjects_by_colour: bool
    probes: AttributeProbes | None = None
    of_sample: MadeOnce = field(default_factory=MadeOnce)

    @cached_property
    def subjects(self) -> Regions | None:
        """Where the frames show the entities; None where the data do not name them by colour."""
        if not self.subjects_by_colour:
            return None
        return find_subjects(self.video_THWC, self.sample.entities)

    @cached_property
    def features_TPD(self) -> Tensor | None:
        """The teacher's features of the clip; a video teacher's T counts tubelets."""
        return None if self.teacher is None else self._encoded(self.teacher, self.video_THWC)

    @property
    def real_features_TD(self) -> Tensor | None:
        """The teacher's features of the real clip, mean over patches."""
        teacher, video_THWC = self.teacher, self.sample.video_THWC
        if teacher is None:
            return None
        return self.of_sample.get(
            "real features", lambda: self._encoded(teacher, video_THWC).mean(1)
        )

    @property
    def reference_features_KD(self) -> Tensor | None:
        """Unit features of the references; None without any, and for a video teacher."""
        teacher, references = self.teacher, self.sample.references
        if teacher is None or teacher.is_video or not references:
            return None

        def make() -> Tensor:
            images_KHWC = torch.stack([r.image_HWC for r in references])
            return self._pooled(teacher, images_KHWC, torch.stack([r.mask_HW for r in references]))

        return self.of_sample.get("reference features", make)

    @property
    def real_lab(self) -> Tensor:
        """Mean CIELAB colour of the real clip, `(3,)`."""
        return self.of_sample.get("real colour", lambda: mean_lab(self.sample.video_THWC))

    def reference_templates(self, size_HW: tuple[int, int]) -> list[list[Template]]:
        """By reference, what it is looked for by in frames of that size."""

        def make() -> list[list[Template]]:
            return [
                subject_templates(reference.image_HWC, reference.mask_HW, size_HW)
                for reference in self.sample.references
            ]

        return self.of_sample.get(f"templates for {size_HW}", make)

    @cached_property
    def appearances(self) -> list[Appearances]:
        """By reference; empty where subjects cannot be found or compared."""
        teacher, regions, reference_KD = self.teacher, self.subjects, self.reference_features_KD
        if teacher is None or regions is None or reference_KD is None:
            return []
        return [
            self._appearances(teacher, regions.masks_ETHW, reference_KD, k)
            for k in range(len(reference_KD))
        ]

    @cached_property
    def recognised(self) -> list[Recognised]:
        """By named subject, which of its attributes the probes recognise; empty without probes."""
        if self.probes is None or self.features_TPD is None:
            return []
        return self.probes.recognised(self.features_TPD, self.grid_HW, self.sample)

    def _appearances(
        self, teacher: Teacher, masks_ETHW: Tensor, reference_KD: Tensor, k: int
    ) -> Appearances:
        reference = self.sample.references[k]
        mask_THW = masks_ETHW[self.sample.entities.index(reference.phrase)]
        shown = mask_THW.flatten(1).any(1).nonzero()[:, 0].tolist()
        cosines = [0.0] * len(mask_THW)
        if not shown:
            return Appearances(cosines, [])
        cutouts = [cutout(self.video_THWC[t], mask_THW[t], reference) for t in shown]
        images, masks = (torch.stack(part) for part in zip(*cutouts, strict=True))
        cosine_TK = self._pooled(teacher, images, masks) @ reference_KD.T
        for t, value in zip(shown, cosine_TK[:, k].tolist(), strict=True):
            cosines[t] = value
        has_others = len(reference_KD) > 1
        return Appearances(cosines, (cosine_TK.argmax(1) != k).tolist() if has_others else [])

    def _encoded(self, teacher: Teacher, video_THWC: Tensor) -> Tensor:
        return teacher.encode(video_THWC[None], self.grid_HW).tokens_BTPD[0].cpu()

    def _pooled(self, teacher: Teacher, images_KHWC: Tensor, masks_KHW: Tensor) -> Tensor:
        """Unit features of the masked part of each image, `(K, D)`."""
        tokens_KPD = self._encoded(teacher, images_KHWC)
        share_KP = covered_share(masks_KHW, (len(masks_KHW), *self.grid_HW))
        return F.normalize((tokens_KPD * share_KP[..., None]).sum(1), dim=-1)


def contrast(clip: GeneratedClip) -> list[float]:
    """RMS contrast."""
    return [rms_contrast(clip.video_THWC)]


def colour(clip: GeneratedClip) -> list[float]:
    """Hasler and Suesstrunk's colourfulness."""
    return [colourfulness(clip.video_THWC)]


def lab_gap(clip: GeneratedClip) -> list[Tensor]:
    """Mean CIELAB colour less that of the real clip, `(3,)`."""
    return [mean_lab(clip.video_THWC) - clip.real_lab]


def norm_of_mean(gaps: Sequence[Tensor]) -> float:
    """Length of the mean vector: what the clips share, while gaps of their own cancel."""
    return float(torch.stack(list(gaps)).mean(0).norm())


def flicker(clip: GeneratedClip) -> list[float]:
    """VBench's temporal flickering score; not of a single frame."""
    return [temporal_flickering(clip.video_THWC)] if len(clip.video_THWC) > 1 else []


def motion(clip: GeneratedClip) -> list[float]:
    """OpenS2V-Eval's motion amplitude; not of a single frame."""
    return [motion_amplitude(clip.video_THWC)] if len(clip.video_THWC) > 1 else []


def pasted(clip: GeneratedClip) -> list[float]:
    """Copy-paste share of each reference that has something to be recognised by."""
    if not clip.sample.references:
        return []
    frames = FrameSpectra.of(clip.video_THWC)
    shares = [best_match(frames, found) for found in clip.reference_templates(frames.size_HW)]
    return [share for share in shares if share is not None]


def subjects_shown(clip: GeneratedClip) -> list[float]:
    """Of each entity and frame: whether the entity is found."""
    if clip.subjects is None:
        return []
    values: list[float] = clip.subjects.masks_ETHW.flatten(2).any(2).flatten().double().tolist()
    return values


def entities_off(clip: GeneratedClip) -> list[float]:
    """Of each frame: how many coloured parts there are too many or too few."""
    if clip.subjects is None:
        return []
    wrong_T = (clip.subjects.parts_T - len(clip.sample.entities)).abs()
    values: list[float] = wrong_T.double().tolist()
    return values


def moves_as_captioned(clip: GeneratedClip) -> list[float]:
    """Of each entity: whether its region moves where the caption says; not of a single frame."""
    if clip.subjects is None or len(clip.subjects.parts_T) < 2:
        return []
    pairs = zip(clip.sample.entities, clip.subjects.masks_ETHW, strict=True)
    return [float(f"{name} moves {direction(mask)}" in clip.sample.caption) for name, mask in pairs]


def reference_match(clip: GeneratedClip) -> list[float]:
    """Of each reference: mean over frames of the cosine with the patch most like it."""
    if clip.reference_features_KD is None or clip.features_TPD is None:
        return []
    match_TPK = F.normalize(clip.features_TPD, dim=-1) @ clip.reference_features_KD.T
    values: list[float] = match_TPK.amax(1).mean(0).tolist()
    return values


def identity(clip: GeneratedClip) -> list[float]:
    """Of each reference and frame: cosine of cutout and reference, 0 where none is shown."""
    return [cosine for shown in clip.appearances for cosine in shown.cosine_T]


def confusion(clip: GeneratedClip) -> list[float]:
    """Of each cutout: whether it is nearer to another reference of the clip than to its own."""
    return [float(confused) for shown in clip.appearances for confused in shown.confused_T]


def frame_features(clip: GeneratedClip) -> list[tuple[Tensor, Tensor]]:
    """Features of the frames of the clip and of the real one, `(T, D)` each."""
    if clip.features_TPD is None or clip.real_features_TD is None:
        return []
    return [(clip.features_TPD.mean(1), clip.real_features_TD)]


def frechet(features: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Fréchet distance of all clips' frames from the real ones'; None of a single frame."""
    shown, real = zip(*features, strict=True)
    if sum(map(len, real)) < 2:
        return None
    return frechet_distance(torch.cat(shown), torch.cat(real))


def named_color(clip: GeneratedClip) -> list[float]:
    """Of each named subject: whether its colour is recognised."""
    return [float(subject.color) for subject in clip.recognised]


def named_motion(clip: GeneratedClip) -> list[float]:
    """Of each named subject: whether its motion is recognised."""
    return [float(subject.motion) for subject in clip.recognised]


def named_texture(clip: GeneratedClip) -> list[float]:
    """Of each named subject: whether its texture is recognised."""
    return [float(subject.texture) for subject in clip.recognised]


def named_shape(clip: GeneratedClip) -> list[float]:
    """Of each named subject: whether its shape is recognised."""
    return [float(subject.shape) for subject in clip.recognised]


def named_all(clip: GeneratedClip) -> list[float]:
    """Of each named subject: whether colour, motion, texture and shape are recognised together."""
    return [float(all(subject)) for subject in clip.recognised]


def cutout(frame_HWC: Tensor, mask_HW: Tensor, like: Reference) -> tuple[Tensor, Tensor]:
    """A frame's subject as a reference image would show it: alone, centred, as large, on white.

    Returns:
        uint8 image and bool mask of the reference's size.
    """
    height, width = like.mask_HW.shape
    rows, columns = mask_HW.any(1).nonzero()[:, 0], mask_HW.any(0).nonzero()[:, 0]
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    opacity_hw = mask_HW[box].float()
    layers = torch.cat([frame_HWC[box].permute(2, 0, 1).float(), opacity_hw[None]])[None]
    scale = 2 * REFERENCE_RADIUS * min(height, width) / max(layers.shape[2:])
    size = tuple(max(1, round(side * scale)) for side in layers.shape[2:])
    layers = F.interpolate(layers, size, mode="bilinear", antialias=True)[0]
    image = torch.full((height, width, 3), 255.0)
    mask = torch.zeros(height, width, dtype=torch.bool)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    place = slice(top, top + size[0]), slice(left, left + size[1])
    opacity_hw1 = layers[3, :, :, None]
    image[place] = layers[:3].permute(1, 2, 0) * opacity_hw1 + 255.0 * (1.0 - opacity_hw1)
    mask[place] = layers[3] > 0.5
    return image.round().clamp(0, 255).to(torch.uint8), mask
