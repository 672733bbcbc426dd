"""Features made visible: colours of the first principal components, points of a t-SNE.

Shape letters: T frames, H, W pixels or patches, C colours, P patches of a frame, N tokens, D and E
widths, M points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from alignlab.losses.grids import match_grid
from alignlab.metrics.features import unit_rows
from alignlab.models.taps import BlockTokens
from alignlab.teachers import Teacher
from alignlab.training.batches import Batch
from alignlab.training.encoded import Encoded
from alignlab.training.teacher_features import teacher_features

PERPLEXITY = 30.0  # scikit-learn's default and the usual choice
TAIL = 0.01  # share of values at either end that get the extreme colours


@dataclass(frozen=True)
class FeatureClip:
    """Video tokens of one val clip as colours, uint8 `(T, H, W, C)` like the clip itself.

    Args:
        caption: of the clip.
        real_THWC: the clip.
        student_THWC: by model; both share one projection, so that equal colours mean alike.
        teacher_THWC: with a projection of its own.
        explained: share of the variance in the three components, by model and for `teacher`.
    """

    SIGMA: ClassVar[float] = 0.3  # noise level of the clip that the student sees

    caption: str
    real_THWC: Tensor
    student_THWC: dict[str, Tensor]
    teacher_THWC: Tensor
    explained: dict[str, float]


def feature_clip(
    taps: Mapping[str, BlockTokens], teacher: Teacher, batch: Batch, clip: Encoded
) -> FeatureClip:
    """The first three principal components as red, green and blue, one projection for all frames.

    Args:
        taps: a block's tokens of the same noisy clip, by model; a batch of one.
        teacher: sees the clip without noise. Its tokens are brought to the student's grid; if it
            leaves the first frame out, that frame shows the features of those after it.
        batch: the clip.
        clip: the clip.
    """
    grid = next(iter(taps.values())).video.grid
    features = teacher_features(teacher, batch, "video", grid)
    matched_TPE = match_grid(features.tokens_BTPD, features.grid, grid)[0].float().cpu()
    missing = grid[0] - len(matched_TPE)
    matched_TPE = torch.cat([matched_TPE[:1]] * missing + [matched_TPE])
    student = [tokens.video.tokens_BND[0].float().cpu() for tokens in taps.values()]
    colours, explained = pca_colours(student)
    teacher_colours, teacher_explained = pca_colours([matched_TPE.flatten(0, 1)])
    video_THWC = clip.sample.video_THWC
    size = tuple(video_THWC.shape[:3])
    return FeatureClip(
        clip.sample.caption,
        video_THWC,
        {
            model: _like_video(colours_NC, grid, size)
            for model, colours_NC in zip(taps, colours, strict=True)
        },
        _like_video(teacher_colours[0], grid, size),
        dict(zip((*taps, "teacher"), (*explained, *teacher_explained), strict=True)),
    )


def pca_colours(sets: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Projects sets of rows `(N, D)` on the first three principal components of all together.

    Each set is centred by itself, so that a shift between two sets takes up no component. A
    component's sign makes its largest loading positive; its 1st and 99th percentile become 0 and
    255.

    Returns:
        uint8 `(N, 3)` of each set, and the share of the set's variance in the three components.
    """
    centred = [rows.double() - rows.double().mean(0) for rows in sets]
    together = torch.cat(centred)
    # Not the singular values of the rows: a long clip has far more rows than columns.
    axes_3D = torch.linalg.eigh(together.T @ together).eigenvectors.T[-3:].flip(0)
    largest = axes_3D.gather(1, axes_3D.abs().argmax(1, keepdim=True))
    axes_3D = axes_3D * largest.sign()
    axes_3D = F.pad(axes_3D, (0, 0, 0, 3 - len(axes_3D)))
    projected = [rows @ axes_3D.T for rows in centred]
    ends = torch.quantile(
        torch.cat(projected), torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64), dim=0
    )
    span = (ends[1] - ends[0]).clamp_min(1e-12)
    colours = [
        ((x - ends[0]) / span * 255).round().clamp(0, 255).to(torch.uint8) for x in projected
    ]
    shares = [
        float(x.square().sum() / rows.square().sum().clamp_min(1e-12))
        for x, rows in zip(projected, centred, strict=True)
    ]
    return colours, shares


def tsne_points(features_ND: Tensor) -> Tensor:
    """t-SNE of unit features, `(N, 2)`: scikit-learn's, started from PCA with seed 0.

    A picture, not a measure: distances between groups and their sizes mean nothing.
    """
    unit_ND = unit_rows(features_ND.double()).numpy()
    perplexity = min(PERPLEXITY, (len(unit_ND) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
    with threadpool_limits(1):  # its sums would otherwise depend on the number of threads
        return torch.from_numpy(tsne.fit_transform(unit_ND))


def _like_video(colours_NC: Tensor, grid: tuple[int, int, int], size: Sequence[int]) -> Tensor:
    """Repeats each token's colour over the pixels and frames that it stands for."""
    frames, height, width = size
    image_TCHW = colours_NC.unflatten(0, grid).movedim(3, 1).float()
    image_TCHW = F.interpolate(image_TCHW, (height, width), mode="nearest")
    if grid[0] > 1:
        group = (frames - 1) // (grid[0] - 1)
        later = image_TCHW[1:].repeat_interleave(group, dim=0)
        image_TCHW = torch.cat([image_TCHW[:1], later])
    return image_TCHW.movedim(1, 3).to(torch.uint8)
