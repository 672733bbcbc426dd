"""How well the tokens of a block agree with a teacher, and tell subjects apart.

Shape letters: B batch, K references, P tokens per reference, N tokens, D student width, E teacher
width, H, W height and width in tokens or pixels.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.losses.grids import match_grid, student_frames
from alignlab.metrics import (
    cknna,
    cross_subject_cosine,
    retrieval_chance,
    silhouette,
    teacher_retrieval,
)
from alignlab.models.taps import BlockTokens
from alignlab.teachers import Teacher
from alignlab.training.alignment import teacher_features
from alignlab.training.batches import Batch, Encoded

CKNNA_K = 10  # REPA's
VIDEO_TOKENS = 2048  # rows that CKNNA compares: its cost grows with their square


@dataclass(frozen=True)
class ReferenceTokens:
    """Foreground reference tokens of a block, clip by clip and reference by reference.

    Args:
        student_ND: the block's tokens.
        teacher_NE: the teacher's tokens of the same places; None for a video teacher.
        subjects_N: which of `names` a token shows.
        clips_N: number of the token's clip in the val split.
        names: of the subjects.
    """

    student_ND: Tensor
    teacher_NE: Tensor | None
    subjects_N: Tensor
    clips_N: Tensor
    names: tuple[str, ...]


class ReferenceProbe:
    """Foreground reference tokens of a block. Metrics, by block:

    - `teacher_retrieval/block<i>`: share of tokens that, mapped linearly to the teacher's space,
      are nearest to a teacher token of the same subject (map fitted on even clips, tested on odd)
    - `silhouette/block<i>`: cosine silhouette of the subjects within a clip
    - `cross_cos/block<i>`: mean positive cosine between tokens of different subjects of a clip

    `<name>/mean` is the mean over blocks, `teacher_retrieval_chance` what guessing would reach. A
    token's own teacher token is in the gallery: most subjects have one image, and another could not
    be asked for. A video teacher has no features of images: retrieval is then left out.
    """

    def __init__(self) -> None:
        self._student: dict[int, list[Tensor]] = defaultdict(list)
        self._teacher: list[Tensor] = []
        self._subjects: list[Tensor] = []
        self._clips: list[Tensor] = []
        self._names: dict[str, int] = {}
        self._within: dict[str, list[float]] = defaultdict(list)

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
        for row, (clip, number) in enumerate(zip(clips, numbers, strict=True)):
            if not clip.sample.references:
                continue
            chosen_N, subject_N = self._foreground(clip, (grid[1], grid[2]))
            if not len(chosen_N):
                continue
            if features_BNE is not None:
                self._teacher.append(features_BNE[row, chosen_N].cpu())
            self._subjects.append(subject_N)
            self._clips.append(torch.full_like(subject_N, number))
            for block, tokens in taps.items():
                student_ND = tokens.reference.tokens_BND[row, chosen_N].float().cpu()
                self._student[block].append(student_ND)
                if len(subject_N.unique()) > 1:
                    within = self._within
                    within[f"silhouette/block{block}"].append(silhouette(student_ND, subject_N))
                    within[f"cross_cos/block{block}"].append(
                        cross_subject_cosine(student_ND, subject_N)
                    )

    def metrics(self) -> dict[str, float]:
        """Metrics of everything added; empty when no clip had references."""
        found = {key: sum(values) / len(values) for key, values in self._within.items()}
        if not self._teacher:
            return with_means(found)
        teacher_NE, subject_N = torch.cat(self._teacher), torch.cat(self._subjects)
        fit_N = torch.cat(self._clips) % 2 == 0
        if fit_N.all() or not fit_N.any():
            return with_means(found)
        for block, tokens in self._student.items():
            student_ND = torch.cat(tokens)
            found[f"teacher_retrieval/block{block}"] = teacher_retrieval(
                student_ND[fit_N],
                teacher_NE[fit_N],
                student_ND[~fit_N],
                teacher_NE[~fit_N],
                subject_N[~fit_N],
            )
        chance = retrieval_chance(subject_N[~fit_N], subject_N[~fit_N])
        return with_means(found) | {"teacher_retrieval_chance": chance}

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

    def _foreground(self, clip: Encoded, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens that lie mostly on a subject, and which subject that is, `(N,)` each."""
        masks = torch.stack([r.mask_HW for r in clip.sample.references])
        share_KP = F.adaptive_avg_pool2d(masks[:, None].float(), size).flatten(1)
        on_KP = share_KP > 0.5
        names = [r.name for r in clip.sample.references]
        ids = torch.tensor([self._names.setdefault(n, len(self._names)) for n in names])
        return on_KP.flatten().nonzero()[:, 0], ids[:, None].expand_as(on_KP)[on_KP]


class VideoProbe:
    """Video tokens of a block. Metric: `cknna/block<i>`, CKNNA (k = 10) against the teacher.

    Rows are single tokens of all clips, evenly thinned to about 2,048; teacher features are
    averaged over the pixel frames of a latent frame. A video teacher leaves the first frame out, so
    that frame is not measured. Each noise level is measured by itself and the results are averaged:
    the same token at two levels would be its own nearest neighbour.

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
        for row, sigma in enumerate(batch.sigma_B.tolist()):
            # Another offset in every clip, so that few rows still come from all places.
            offset = len(self._teacher[sigma]) % stride
            self._teacher[sigma].append(matched_BNE[row, offset::stride].cpu())
            for block, tokens in student.items():
                self._student[block, sigma].append(tokens[row, offset::stride].float().cpu())

    def metrics(self) -> dict[str, float]:
        """Metrics of everything added."""
        found: dict[str, float] = defaultdict(float)
        for block, _, student_ND, teacher_NE in self.rows():
            value = cknna(student_ND, teacher_NE, k=CKNNA_K)
            found[f"cknna/block{block}"] += value / len(self._teacher)
        return with_means(dict(found))

    def rows(self) -> Iterator[tuple[int, float, Tensor, Tensor]]:
        """Block, noise level, and the same rows of student (N, D) and teacher (N, E)."""
        for (block, sigma), tokens in self._student.items():
            yield block, sigma, torch.cat(tokens), torch.cat(self._teacher[sigma])


def with_means(per_block: dict[str, float]) -> dict[str, float]:
    """Adds `<name>/mean` over the blocks of every `<name>/block<i>`."""
    groups: dict[str, list[float]] = defaultdict(list)
    for key, value in per_block.items():
        groups[f"{key.split('/')[0]}/mean"].append(value)
    return per_block | {key: sum(values) / len(values) for key, values in groups.items()}
