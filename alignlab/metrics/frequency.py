"""How fine a frame's tokens change over the grid: their power by spatial frequency.

Shape letters: N = H*W tokens of one frame, row by row, D width.
"""

import numpy as np
import torch
from scipy.fft import dctn
from torch import Tensor

from alignlab.metrics.features import feature_rows

BANDS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 2.0))
"""Of frequencies, as shares of one change per two tokens along a side; the corner has sqrt(2)."""


def frequency_bands(tokens_ND: Tensor, size_HW: tuple[int, int]) -> tuple[float, ...]:
    """Share of the tokens' spatial power in each of `BANDS`; they sum to 1.

    Power of the cosine transform (DCT-II) of every channel over the grid, summed over the channels,
    in float64; without the mean token, which is no spatial structure. A cosine transform continues
    the grid by reflection, so that opposite edges that differ give no high frequencies. Align4Gen
    (arXiv 2509.09547) says of DINOv2 that it carries low frequencies, and of SAM 2 high ones; its
    formula is not known. Tokens that do not depend on their neighbours have 0.05, 0.15, 0.25 and
    0.56 on a large grid.

    Args:
        tokens_ND: of one frame.
        size_HW: their grid.

    Returns:
        a share per band, or none where all tokens are equal.

    Raises:
        ValueError: tokens do not fill the grid, or hold a NaN or infinity.
    """
    rows_ND = feature_rows("tokens_ND", tokens_ND)
    height, width = size_HW
    if len(rows_ND) != height * width:
        raise ValueError(f"{len(rows_ND)} tokens do not fill the grid {size_HW}")
    grid_HWD = rows_ND.unflatten(0, size_HW).cpu().numpy()
    power_HW = np.square(dctn(grid_HWD, axes=(0, 1), norm="ortho")).sum(2)
    mean_power, power_HW[0, 0] = power_HW[0, 0], 0.0
    total = power_HW.sum()
    if total <= 1e-12 * mean_power or total == 0.0:
        return ()
    frequency_HW = np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width)
    return tuple(
        float(power_HW[(frequency_HW >= low) & (frequency_HW < high)].sum() / total)
        for low, high in BANDS
    )


def temporal_stability(tokens_TND: Tensor, mean_D: Tensor) -> float | None:
    """Mean cosine of tokens at the same place in consecutive frames, in float64.

    The mean of all tokens of the data set is taken off first: an encoder whose tokens all point one
    way would else look steady whatever it sees. 1: nothing changes; 0: as tokens of different
    clips. Motion lowers it for any encoder, so that only encoders of the same clips compare.

    Args:
        tokens_TND: of one clip.
        mean_D: mean token of all clips.

    Returns:
        it, or None for one frame.
    """
    if len(tokens_TND) < 2:
        return None
    centred = tokens_TND.double() - mean_D.double()
    return float(torch.cosine_similarity(centred[1:], centred[:-1], dim=-1).mean())
