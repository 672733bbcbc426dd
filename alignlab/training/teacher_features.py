"""Features of a teacher for a batch, on the student's grid or its own.

Shape letters: B batch, K references, P tokens per frame, D width, T frames, H, W of a grid.
"""

import torch

from alignlab.errors import UserError
from alignlab.losses.objective import Features, Grid
from alignlab.teachers import DiffusionTeacher, Teacher, image_families
from alignlab.training.batch_context import ClipContents
from alignlab.training.encoded import FeatureRead, TokenKind


def teacher_features(
    teacher: Teacher | DiffusionTeacher,
    clips: ClipContents,
    kind: TokenKind,
    grid: Grid,
    *,
    is_shuffled: bool = False,
) -> Features:
    """A teacher's features of the batch's frames (`video`) or reference images (`reference`).

    The teacher's patch grid is the student's, unless it has its own for video; along time it sees
    every pixel frame. Each clip is encoded by itself (`Encoded.features`), or read from the dataset
    cache; references are padded with zeros to `(B, K, P, D)`.

    Args:
        teacher: of either kind.
        clips: of the batch.
        kind: of tokens.
        grid: (T, H, W) of the student's tokens.
        is_shuffled: take other clips' features (`alignlab.training.shuffle`).

    Raises:
        UserError: reference images for a video teacher.
    """
    if kind == "video":
        read = FeatureRead(teacher, "video", teacher.grid or grid[1:], is_shuffled)
        tokens_BTPD = torch.stack([rows for rows in clips.features(read) if rows is not None])
        heads = teacher.heads if isinstance(teacher, Teacher) else ()  # others give hidden tokens
        return Features(tokens_BTPD, (tokens_BTPD.shape[1], *read.grid_HW), heads)
    if teacher.is_video:
        raise UserError(
            "teachers: a video teacher takes whole clips, and references are images: give "
            f"objectives on reference tokens an image teacher ({image_families()})"
        )
    shape = (len(clips.sigma_B), grid[0], grid[1] * grid[2], teacher.dim)
    padded = torch.zeros(shape, device=clips.sigma_B.device)
    read = FeatureRead(teacher, "reference", grid[1:], is_shuffled)
    for row, rows in enumerate(clips.features(read)):
        if rows is not None:
            padded[row, : len(rows)] = rows
    return Features(padded, grid)
