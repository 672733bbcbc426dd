"""Brings a teacher's tokens onto the student's grid, in one explicit place.

Shape letters: B batch, T frames, P tokens per frame, D width. A grid is (T, H, W).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.losses.objective import Grid

TimeMatch = Literal["group_mean", "select"]
SpaceMatch = Literal["bilinear", "area"]


def match_grid(
    teacher_BTPD: Tensor,
    teacher_grid: Grid,
    student_grid: Grid,
    *,
    time: TimeMatch = "group_mean",
    space: SpaceMatch = "bilinear",
) -> Tensor:
    """Resamples teacher tokens to the student's grid; equal grids are returned as they are.

    Time follows a causal video VAE: its first latent frame covers one pixel frame, each later one
    a group of g = (T_teacher - 1) / (T_student - 1) frames.

    Args:
        teacher_BTPD: on `teacher_grid`.
        teacher_grid: (T, H, W) of the teacher.
        student_grid: (T, H, W) of the student.
        time: "group_mean" keeps the first frame and averages each group (VideoREPA's REPA
            baseline, released code); "select" takes the last frame of each group.
        space: "bilinear", or "area" to average the teacher's tokens when they are the finer ones.

    Returns:
        (B, T, P, D) on the student's grid, float32 (float64 from float64) if resampled.

    Raises:
        ValueError: the frames of the two grids do not correspond.
    """
    group = _frames_per_group(student_grid, teacher_grid)
    if teacher_grid == student_grid:
        return teacher_BTPD
    if teacher_BTPD.dtype != torch.float64:
        teacher_BTPD = teacher_BTPD.float()
    batch, _, tokens, width = teacher_BTPD.shape
    frames = student_grid[0]
    if group > 1 and time == "group_mean":
        groups = teacher_BTPD[:, 1:].reshape(batch, frames - 1, group, tokens, width)
        teacher_BTPD = torch.cat([teacher_BTPD[:, :1], groups.mean(2)], dim=1)
    elif group > 1:
        teacher_BTPD = teacher_BTPD[:, ::group]
    if teacher_grid[1:] == student_grid[1:]:
        return teacher_BTPD
    image = teacher_BTPD.flatten(0, 1).mT.reshape(-1, width, *teacher_grid[1:])
    image = F.interpolate(image, size=student_grid[1:], mode=space)
    return image.flatten(2).mT.reshape(batch, frames, -1, width)


def describe(
    student_grid: Grid,
    teacher_grid: Grid,
    *,
    time: TimeMatch = "group_mean",
    space: SpaceMatch = "bilinear",
) -> str:
    """Says in one line what `match_grid` does with two grids, for the log of a run."""
    steps = []
    if _frames_per_group(student_grid, teacher_grid) > 1:
        steps.append("group mean in time" if time == "group_mean" else "select in time")
    if teacher_grid[1:] != student_grid[1:]:
        steps.append(f"{space} in space")
    how = ", ".join(steps) or "equal"
    return f"{student_grid} student <- {teacher_grid} teacher: {how}"


def _frames_per_group(student_grid: Grid, teacher_grid: Grid) -> int:
    """Counts the teacher frames of each student frame after the first; 1 if they are equal."""
    student_frames, teacher_frames = student_grid[0], teacher_grid[0]
    if student_frames == teacher_frames:
        return 1
    grouped = 1 < student_frames < teacher_frames
    if not grouped or (teacher_frames - 1) % (student_frames - 1) != 0:
        raise ValueError(
            f"cannot match teacher grid {teacher_grid} to student grid {student_grid}: a student "
            "of T frames needs a teacher of T, or of 1 + g(T-1), frames"
        )
    return (teacher_frames - 1) // (student_frames - 1)
