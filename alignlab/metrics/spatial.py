"""Spatial structure of one frame's tokens: does similarity follow place?

Shape letters: N = H*W tokens of one frame, row by row, D width.
"""

import torch
from torch import Tensor

from alignlab.metrics.features import feature_rows, label_rows, unit_rows

NEAR = 1  # Manhattan distance; iREPA's released code
FAR = 6  # iREPA's released code; its paper says half of the grid's side
REACH = 8  # iREPA's released code


def spatial_structure(
    tokens_ND: Tensor,
    size_HW: tuple[int, int],
    foreground_N: Tensor | None = None,
    background_N: Tensor | None = None,
    *,
    near: int = NEAR,
    far: int = FAR,
    reach: int = REACH,
) -> dict[str, float]:
    """iREPA's four measures (arXiv 2512.10794), from cosines in float64; higher is more structure.

    iREPA finds that they predict how much a teacher helps a generator, where its accuracy as a
    classifier does not. With Manhattan distances between tokens on the grid:

    - `lds`: mean cosine of pairs up to `near` apart minus that of pairs `far` or more apart
    - `cds`: minus the slope of the mean cosine over the distances 1 to `reach`, by least squares in
      which every distance counts the same
    - `srss`: mean over foreground tokens of the mean cosine with other foreground tokens up to
      `near` apart minus that with background tokens `far` or more apart; of tokens that have both
    - `rmsc`: root mean square distance of the unit tokens from their mean, in [0, 1]

    A measure is left out where the frame has no such pairs: a small grid has no distant tokens.

    Args:
        tokens_ND: of one frame.
        size_HW: their grid.
        foreground_N: 0 or 1, which tokens show a subject; only for `srss`.
        background_N: 0 or 1, which tokens show none; default: all others.
        near: Manhattan distance.
        far: Manhattan distance.
        reach: Manhattan distance.

    Raises:
        ValueError: tokens do not fill the grid, or hold a NaN or infinity.
    """
    unit_ND = unit_rows(feature_rows("tokens_ND", tokens_ND))
    height, width = size_HW
    if len(unit_ND) != height * width:
        raise ValueError(f"{len(unit_ND)} tokens do not fill the grid {size_HW}")
    number_N = torch.arange(height * width, device=unit_ND.device)
    place_N2 = torch.stack([number_N // width, number_N % width], 1)
    distance_NN = (place_N2[:, None] - place_N2).abs().sum(2)
    cosine_NN = unit_ND @ unit_ND.T
    close_NN = (distance_NN > 0) & (distance_NN <= near)
    measures = {
        "lds": _difference(cosine_NN, close_NN, distance_NN >= far),
        "cds": _decay(cosine_NN, distance_NN, min(reach, height + width - 2)),
        "rmsc": float((unit_ND - unit_ND.mean(0)).square().sum(1).mean().sqrt()),
    }
    if foreground_N is not None:
        inside_N = _shown("foreground_N", foreground_N, unit_ND)
        outside_N = ~inside_N
        if background_N is not None:
            outside_N = _shown("background_N", background_N, unit_ND)
        own_NN = inside_N[:, None] & inside_N & close_NN
        other_NN = inside_N[:, None] & outside_N & (distance_NN >= far)
        measures["srss"] = _difference_by_row(cosine_NN, own_NN, other_NN)
    return {name: value for name, value in measures.items() if value is not None}


def _shown(name: str, given_N: Tensor, unit_ND: Tensor) -> Tensor:
    return (label_rows(name, given_N.long(), len(unit_ND)) > 0).to(unit_ND.device)


def _difference(cosine_NN: Tensor, left_NN: Tensor, right_NN: Tensor) -> float | None:
    if not (left_NN.any() and right_NN.any()):
        return None
    return float(cosine_NN[left_NN].mean() - cosine_NN[right_NN].mean())


def _difference_by_row(cosine_NN: Tensor, left_NN: Tensor, right_NN: Tensor) -> float | None:
    """Mean over the rows that have pairs of both kinds."""
    has_both_N = left_NN.any(1) & right_NN.any(1)
    if not has_both_N.any():
        return None
    left_N, right_N = ((cosine_NN * kind).sum(1) / kind.sum(1) for kind in (left_NN, right_NN))
    return float((left_N - right_N)[has_both_N].mean())


def _decay(cosine_NN: Tensor, distance_NN: Tensor, reach: int) -> float | None:
    if reach < 2:
        return None
    steps = torch.arange(1, reach + 1, dtype=torch.float64)
    means = torch.stack([cosine_NN[distance_NN == step].mean() for step in range(1, reach + 1)])
    centred = steps - steps.mean()
    return -float((centred * means.cpu()).sum() / centred.square().sum())
