"""How much of one teacher's features another one has: which two are worth fusing?

Shape letters: N tokens, P patches of a frame, D width.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from alignlab.evaluation.teacher_score import TeacherScore
from alignlab.losses.grids import match_grid
from alignlab.metrics import cka

MOST_TOKENS = 2000  # of all clips, evenly chosen: the similarities are a square matrix


def similar_pairs(scores: Sequence[TeacherScore]) -> dict[tuple[str, str], float]:
    """Unbiased CKA between the tokens of every two teachers, of the middle frames of all clips.

    Every teacher's tokens are resampled to the coarsest grid of all. Low is what Align4Gen looks
    for in encoders to fuse (arXiv 2509.09547): two that see different things. A teacher of clips
    sees the two frames around the middle.

    Args:
        scores: of the same clips.

    Returns:
        a value for each pair of aliases, in the order of `scores`.
    """
    grid = (min(s.grid[1] for s in scores), min(s.grid[2] for s in scores))
    tokens = {score.alias: _thinned(score, grid) for score in scores}
    return {
        (one, other): cka(tokens[one], tokens[other], unbiased=True)
        for one, other in combinations(tokens, 2)
    }


def _thinned(score: TeacherScore, grid: tuple[int, int]) -> Tensor:
    """Tokens (N, D) of all clips on the common grid."""
    frames_1CPD = torch.stack(score.middle)[None]
    clips = len(score.middle)
    own, common = (clips, *score.grid[1:]), (clips, *grid)
    rows_ND = match_grid(frames_1CPD, own, common)[0].flatten(0, 1)
    return rows_ND[:: -(-len(rows_ND) // MOST_TOKENS)]
