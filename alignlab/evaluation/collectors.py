"""Collects, batch by batch and clip by clip, what the rows of the metric tables are measured of.

Shape letters: B batch, K references, P tokens per reference, N tokens, D student width, E teacher
width, T, H, W, C frames.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from alignlab.data.sample import Sample
from alignlab.evaluation.generation_metrics import GeneratedClip
from alignlab.evaluation.metric_registry import (
    GENERATION_METRICS,
    REFERENCE_METRICS,
    VIDEO_METRICS,
    GenerationMetric,
    mean,
)
from alignlab.evaluation.named_subjects import AttributeProbes
from alignlab.evaluation.token_metrics import ReferenceTokens, TeacherTokens, VideoTokens
from alignlab.losses.grids import FOREGROUND, covered_share, match_grid, student_frames
from alignlab.models.taps import BlockTokens
from alignlab.teachers import Teacher
from alignlab.training.batches import Batch
from alignlab.training.clip_memory import MadeOnce
from alignlab.training.encoded import Encoded
from alignlab.training.teacher_features import teacher_features

VIDEO_TOKENS = 2048  # tokens that CKNNA compares: its cost grows with their square


class GenerationCollector:
    """Measures generated clips one by one, and keeps what the metrics are reduced from.

    What cannot be measured is left out, never zero.

    Args:
        teacher: whose features are compared; None leaves out what needs one.
        grid_HW: its patches on a frame or reference, unless it has a grid of its own.
        subjects_by_colour: as the data set's settings say (`ClipsConfig`).
        probes: fitted attribute probes; None leaves out what needs them.
        metrics: the rows that are measured.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        grid_HW: tuple[int, int],
        *,
        subjects_by_colour: bool,
        probes: AttributeProbes | None = None,
        metrics: Mapping[str, GenerationMetric] = GENERATION_METRICS,
    ) -> None:
        self._teacher = teacher
        # one grid, so that references and frames are seen at the same scale
        self._grid_HW = (teacher.grid if teacher is not None else None) or grid_HW
        self._subjects_by_colour = subjects_by_colour
        self._probes = probes
        self._metrics = metrics
        self._values: dict[str, list[Any]] = {}

    def add(self, video_THWC: Tensor, sample: Sample, of_sample: MadeOnce | None = None) -> None:
        """Measures a uint8 clip.

        Args:
            video_THWC: its frames.
            sample: whose conditions it was generated for.
            of_sample: what metrics need of the sample, from clips that were generated for it and
                measured with the same teacher; gets what it lacks. None: nothing is known.
        """
        clip = GeneratedClip(
            video_THWC,
            sample,
            self._teacher,
            self._grid_HW,
            self._subjects_by_colour,
            self._probes,
            MadeOnce() if of_sample is None else of_sample,
        )
        for name, metric in self._metrics.items():
            values = metric.measure(clip)
            if values:
                self._values.setdefault(name, []).extend(values)

    def metrics(self) -> dict[str, float]:
        """Of everything added: first the means, then what is reduced in another way."""
        names = sorted(self._values, key=self._has_own_reduction)
        reduced = {name: self._metrics[name].reduce(self._values[name]) for name in names}
        return {name: value for name, value in reduced.items() if value is not None}

    def _has_own_reduction(self, name: str) -> bool:
        return self._metrics[name].reduce is not mean


class ReferenceCollector:
    """Foreground reference tokens of the tapped blocks, of all clips and noise levels added.

    `<name>/mean` is the mean over blocks. A video teacher has no features of images: what needs
    them is left out.
    """

    def __init__(self) -> None:
        self._student: dict[int, list[Tensor]] = defaultdict(list)
        self._teacher: list[Tensor] = []
        self._subjects: list[Tensor] = []
        self._clips: list[Tensor] = []
        self._names: dict[str, int] = {}
        self._of_clips: dict[str, list[float]] = defaultdict(list)

    def add(
        self,
        taps: Mapping[int, BlockTokens],
        batch: Batch,
        clips: list[Encoded],
        numbers: list[int],
        teacher: Teacher,
    ) -> None:
        """Collects a batch.

        Args:
            taps: captured blocks of the batch.
            batch: its inputs.
            clips: its clips, in order.
            numbers: the clips' positions in the val split.
            teacher: whose features the tokens are compared with.
        """
        grid = next(iter(taps.values())).reference.grid
        if grid[0] == 0:
            return
        features_BNE = None
        if not teacher.is_video:
            features = teacher_features(teacher, batch, "reference", grid)
            features_BNE = features.tokens_BTPD.flatten(1, 2)
        for place, (clip, number) in enumerate(zip(clips, numbers, strict=True)):
            if not clip.pixels.names:
                continue
            foreground_N, subjects_N = self._foreground(clip, (grid[1], grid[2]))
            if not len(foreground_N):
                continue
            teacher_NE = None
            if features_BNE is not None:
                teacher_NE = features_BNE[place, foreground_N].cpu()
                self._teacher.append(teacher_NE)
            self._subjects.append(subjects_N)
            clips_N = torch.full_like(subjects_N, number)
            self._clips.append(clips_N)
            for block, tokens in taps.items():
                student_ND = tokens.reference.tokens_BND[place, foreground_N].float().cpu()
                self._student[block].append(student_ND)
                reference_tokens = ReferenceTokens(
                    student_ND, teacher_NE, subjects_N, clips_N, tuple(self._names)
                )
                self._measure_clip(block, reference_tokens)

    def metrics(self) -> dict[str, float]:
        """Metrics of everything added; empty when no clip had references."""
        values = {key: mean(of_clips) for key, of_clips in self._of_clips.items()}
        shared: dict[str, float] = {}
        for block in self._student:
            tokens = self.tokens(block)
            for name, metric in REFERENCE_METRICS.items():
                key = f"{name}/block{block}" if metric.by_block else name
                if metric.within_clip or key in shared or tokens is None:
                    continue
                value = metric.measure(tokens)
                if value is not None:
                    (values if metric.by_block else shared)[key] = value
        return with_means(values) | shared

    def tokens(self, block: int) -> ReferenceTokens | None:
        """Everything added of a block; None when no clip had references."""
        if not self._subjects:
            return None
        return ReferenceTokens(
            torch.cat(self._student[block]),
            torch.cat(self._teacher) if self._teacher else None,
            torch.cat(self._subjects),
            torch.cat(self._clips),
            tuple(self._names),
        )

    def _measure_clip(self, block: int, tokens: ReferenceTokens) -> None:
        for name, metric in REFERENCE_METRICS.items():
            value = metric.measure(tokens) if metric.within_clip else None
            if value is not None:
                self._of_clips[f"{name}/block{block}"].append(value)

    def _foreground(self, clip: Encoded, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens that lie mostly on a subject, and which subject that is, `(N,)` each."""
        masks_KHW = torch.stack([r.mask_HW for r in clip.pixels.references])
        is_on_KP = covered_share(masks_KHW, (len(masks_KHW), *size)) > FOREGROUND
        names = clip.pixels.names
        ids = torch.tensor([self._names.setdefault(n, len(self._names)) for n in names])
        return is_on_KP.flatten().nonzero()[:, 0], ids[:, None].expand_as(is_on_KP)[is_on_KP]


class VideoCollector:
    """Video tokens of the tapped blocks.

    Single tokens of all clips, evenly thinned to about 2,048; teacher features are averaged over
    the pixel frames of a latent frame. A video teacher leaves the first frame out, so that frame is
    not measured. Each noise level is measured by itself and the results are averaged: the same
    token at two levels would be its own nearest neighbour.

    Args:
        clips: how many clips will be added at each noise level.
    """

    def __init__(self, clips: int) -> None:
        self._per_clip = max(1, VIDEO_TOKENS // clips)
        self._student: dict[tuple[int, float], list[Tensor]] = defaultdict(list)
        self._teacher: dict[float, list[Tensor]] = defaultdict(list)

    def add(self, taps: Mapping[int, BlockTokens], batch: Batch, teacher: Teacher) -> None:
        """Collects a batch."""
        grid = next(iter(taps.values())).video.grid
        features = teacher_features(teacher, batch, "video", grid)
        matched_BNE = match_grid(features.tokens_BTPD, features.grid, grid).flatten(1, 2)
        student = {
            block: student_frames(tokens.video.tokens_BND, grid, features.grid).flatten(1, 2)
            for block, tokens in taps.items()
        }
        count = matched_BNE.shape[1]
        stride = max(1, count // self._per_clip)
        for place, sigma in enumerate(batch.sigma_B.tolist()):
            # Another offset in every clip, so that few tokens still come from all places.
            offset = len(self._teacher[sigma]) % stride
            self._teacher[sigma].append(matched_BNE[place, offset::stride].cpu())
            for block, tokens_BND in student.items():
                thinned_ND = tokens_BND[place, offset::stride].float().cpu()
                self._student[block, sigma].append(thinned_ND)

    def metrics(self) -> dict[str, float]:
        """Metrics of everything added."""
        values: dict[str, float] = defaultdict(float)
        for block, _, tokens in self.tokens():
            for name, metric in VIDEO_METRICS.items():
                values[f"{name}/block{block}"] += metric.measure(tokens) / len(self._teacher)
        return with_means(dict(values))

    def tokens(self) -> Iterator[tuple[int, float, VideoTokens]]:
        """Block, noise level, and their tokens."""
        teacher: dict[float, TeacherTokens] = {}
        for sigma, parts in self._teacher.items():
            tokens_NE = torch.cat(parts)
            # noise is no part of what a teacher sees: with the same clips it is the same tokens
            same = (t for t in teacher.values() if torch.equal(t.tokens_NE, tokens_NE))
            teacher[sigma] = next(same, TeacherTokens(tokens_NE))
        for (block, sigma), student in self._student.items():
            yield block, sigma, VideoTokens(torch.cat(student), teacher[sigma])


def with_means(by_block: dict[str, float]) -> dict[str, float]:
    """Adds `<name>/mean` over the blocks of every `<name>/block<i>`."""
    groups: dict[str, list[float]] = defaultdict(list)
    for key, value in by_block.items():
        groups[f"{key.split('/')[0]}/mean"].append(value)
    return by_block | {key: mean(values) for key, values in groups.items()}
