"""What generated clips show, held against their references, captions and real clips.

docs/metrics.md has every formula, and what each measure cannot tell. Shape letters: T frames, P
patches, D width, K references, E entities, H height, W width, C channels (RGB).
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.data.sample import Reference, Sample
from alignlab.data.shapes.dataset import REFERENCE_RADIUS
from alignlab.data.shapes.detect import Found, direction, find_subjects
from alignlab.metrics import (
    colourfulness,
    copy_paste,
    frechet_distance,
    mean_lab,
    motion_amplitude,
    rms_contrast,
    temporal_flickering,
)
from alignlab.teachers import Teacher


class GenerationJudge:
    """Collects clips and averages what it measures of them. Metrics:

    - of any clip: `contrast` (RMS), `colourfulness` (Hasler and Suesstrunk), `colour_cast`
      against the real clips with the same captions, `flicker` (VBench) and `motion_amplitude`
      (OpenS2V-Eval) unless it is one frame, and with a teacher `frechet` against the same clips
    - of clips with references: `copy_paste_proxy`, and with an image teacher
      `reference_match_proxy`, the cosine of a reference and the patch most like it
    - in the world of `shapes`: `found_proxy`, `entities_proxy`, `motion_proxy`, and with an image
      teacher `identity_proxy` and `confusion_proxy` of the subjects that `find_subjects` finds

    What cannot be measured is left out, never zero.

    Args:
        teacher: whose features are compared; None leaves out what needs one.
        grid_HW: its patches on a frame or reference.
        is_shapes: whether captions and subjects are those of `shapes`.
    """

    def __init__(
        self, teacher: Teacher | None, grid_HW: tuple[int, int], *, is_shapes: bool
    ) -> None:
        self._teacher = teacher
        # one grid, so that references and frames are seen at the same scale
        self._grid_HW = (teacher.grid if teacher is not None else None) or grid_HW
        self._is_shapes = is_shapes
        self._values: dict[str, list[float]] = defaultdict(list)
        self._shown: list[Tensor] = []
        self._real: list[Tensor] = []
        self._lab_gaps: list[Tensor] = []

    def add(self, video_THWC: Tensor, sample: Sample) -> None:
        """Measures a uint8 clip that was generated for the conditions of `sample`."""
        self._values["contrast"].append(rms_contrast(video_THWC))
        self._values["colourfulness"].append(colourfulness(video_THWC))
        self._lab_gaps.append(mean_lab(video_THWC) - mean_lab(sample.video_THWC))
        if len(video_THWC) > 1:
            self._values["flicker"].append(temporal_flickering(video_THWC))
            self._values["motion_amplitude"].append(motion_amplitude(video_THWC))
        for reference in sample.references:
            share = copy_paste(video_THWC, reference.image_HWC, reference.mask_HW)
            if share is not None:
                self._values["copy_paste_proxy"].append(share)
        found = find_subjects(video_THWC, sample.entities) if self._is_shapes else None
        if found is not None:
            self._add_found(found, sample)
        if self._teacher is not None:
            self._add_features(self._teacher, video_THWC, sample, found)

    def metrics(self) -> dict[str, float]:
        """Means over everything added."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        if self._lab_gaps:
            means["colour_cast"] = float(torch.stack(self._lab_gaps).mean(0).norm())
        if sum(len(rows) for rows in self._real) > 1:
            means["frechet"] = frechet_distance(torch.cat(self._shown), torch.cat(self._real))
        return means

    def _add_found(self, found: Found, sample: Sample) -> None:
        self._values["found_proxy"] += (
            found.masks_ETHW.flatten(2).any(2).flatten().double().tolist()
        )
        wrong_T = (found.parts_T - len(sample.entities)).abs()
        self._values["entities_proxy"] += wrong_T.double().tolist()
        if len(found.parts_T) < 2:
            return
        for phrase, mask_THW in zip(sample.entities, found.masks_ETHW, strict=True):
            says = f"{phrase} moves {direction(mask_THW)}"
            self._values["motion_proxy"].append(float(says in sample.caption))

    def _add_features(
        self, teacher: Teacher, video_THWC: Tensor, sample: Sample, found: Found | None
    ) -> None:
        tokens_TPD, real_TPD = (
            teacher.encode(clip[None], self._grid_HW).tokens_BTPD[0].cpu()
            for clip in (video_THWC, sample.video_THWC)
        )
        self._shown.append(tokens_TPD.mean(1))
        self._real.append(real_TPD.mean(1))
        if teacher.is_video or not sample.references:
            return
        reference_KD = self._pooled(
            teacher,
            torch.stack([r.image_HWC for r in sample.references]),
            torch.stack([r.mask_HW for r in sample.references]),
        )
        match_TPK = F.normalize(tokens_TPD, dim=-1) @ reference_KD.T
        self._values["reference_match_proxy"] += match_TPK.amax(1).mean(0).tolist()
        if found is not None:
            self._add_identity(teacher, video_THWC, sample, found, reference_KD)

    def _add_identity(
        self,
        teacher: Teacher,
        video_THWC: Tensor,
        sample: Sample,
        found: Found,
        reference_KD: Tensor,
    ) -> None:
        for k, reference in enumerate(sample.references):
            mask_THW = found.masks_ETHW[sample.entities.index(reference.phrase)]
            seen = mask_THW.flatten(1).any(1).nonzero()[:, 0].tolist()
            cosines = [0.0] * len(mask_THW)
            if seen:
                cut = [cutout(video_THWC[t], mask_THW[t], reference) for t in seen]
                images, masks = (torch.stack(part) for part in zip(*cut, strict=True))
                cosine_TK = self._pooled(teacher, images, masks) @ reference_KD.T
                for t, value in zip(seen, cosine_TK[:, k].tolist(), strict=True):
                    cosines[t] = value
                if len(reference_KD) > 1:
                    confused_T = cosine_TK.argmax(1) != k
                    self._values["confusion_proxy"] += confused_T.double().tolist()
            self._values["identity_proxy"] += cosines

    def _pooled(self, teacher: Teacher, images_KHWC: Tensor, masks_KHW: Tensor) -> Tensor:
        """Unit features of the masked part of each image, `(K, D)`."""
        tokens_KPD = teacher.encode(images_KHWC[None], self._grid_HW).tokens_BTPD[0].cpu()
        share_KP = F.adaptive_avg_pool2d(masks_KHW[:, None].float(), self._grid_HW).flatten(1)
        return F.normalize((tokens_KPD * share_KP[..., None]).sum(1), dim=-1)


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
