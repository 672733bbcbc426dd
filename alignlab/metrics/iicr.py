"""Do the frames of one video stay together and apart from other videos?

Shape letters: N frames of all videos, D width.
"""

from torch import Tensor

from alignlab.metrics.features import feature_rows, label_rows, nearest


def iicr(frames_ND: Tensor, videos_N: Tensor, k: int) -> float:
    """IICR-like score: mean share of a frame's `k` nearest frames that are of its own video.

    Align4Gen (arXiv 2509.09547) names the measure and plots it against `k` without a formula; this
    is a working definition with the published behaviour (in [0, 1], falling with `k`, higher when
    features are steady within a video and distinct between videos). Report it as "IICR-like".
    Neighbours are by cosine among all frames of all videos but the frame itself. Chance level:
    `(F - 1) / (N - 1)` for videos of F frames each. Once `k` exceeds F - 1 the score cannot
    reach 1.

    Args:
        frames_ND: one row per frame, its patch tokens pooled.
        videos_N: int, which video a frame is of.
        k: neighbours, 1 .. N - 1.

    Raises:
        ValueError: bad shapes or values, fewer than two videos, k out of range.
    """
    frames_ND = feature_rows("frames_ND", frames_ND, minimum=2)
    rows = frames_ND.shape[0]
    videos_N = label_rows("videos_N", videos_N, rows).to(frames_ND.device)
    if bool((videos_N == videos_N[0]).all()):
        raise ValueError("videos_N must name at least two videos")
    if not 1 <= k < rows:
        raise ValueError(f"k must be in 1 .. {rows - 1} for {rows} frames, got {k}")
    own_N = videos_N.new_ones(rows).cumsum(0)
    indices_NK, _ = nearest(frames_ND, frames_ND, k, query_ids_N=own_N, gallery_ids_M=own_N)
    same_NK = videos_N[indices_NK] == videos_N[:, None]
    return float(same_NK.double().mean())
