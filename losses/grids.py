"""Brings tokens of student and teacher onto one grid, in one explicit place.

Time follows a causal video VAE: its first latent frame covers one pixel frame, each later one a
group. A teacher of T_teacher frames fits a student of T frames in one of three ways:

    T_teacher = T            the same frames
    T_teacher = 1 + g(T-1)   it saw every pixel frame (an image model): the first one by itself,
                             then g for each later student frame
    T_teacher = g(T-1)       it left the first pixel frame out (a video model with tubelets), so the
                             student's first frame has no counterpart and is dropped

Where two of them fit, which only a student of two frames can have, the upper one is meant.
Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width. A grid is (T, H, W).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int, int]
"""(T, H, W) of a token set, in row-major order; for reference tokens (K, H, W)."""
Side = Literal["student", "teacher"]

FOREGROUND = 0.5  # of a token's area: what is mostly on a subject counts as showing it


def match_grid(teacher_BTPD: Tensor, teacher_grid: Grid, student_grid: Grid) -> Tensor:
    """Resamples teacher tokens to the student's grid; equal grids are returned as they are.

    Each group of frames is averaged, and a first frame that was seen by itself is kept
    (VideoREPA's REPA baseline, released code).

    Args:
        teacher_BTPD: on `teacher_grid`.
        teacher_grid: (T, H, W) of the teacher.
        student_grid: (T, H, W) of the student.

    Returns:
        (B, T, P, D) on the student's grid, or (B, T-1, P, D) without its first frame where
        `drops_first_frame` (then take `student_frames` of the student). In float32 (float64 from
        float64) if resampled.

    Raises:
        ValueError: the frames of the two grids do not correspond.
    """
    group, keeps_first = _correspondence(student_grid, teacher_grid)
    if teacher_grid == student_grid:
        return teacher_BTPD
    x = _float(teacher_BTPD)
    if group > 1:
        first, rest = (x[:, :1], x[:, 1:]) if keeps_first else (x[:, :0], x)
        x = torch.cat([first, rest.unflatten(1, (-1, group)).mean(2)], dim=1)
    if teacher_grid[1:] == student_grid[1:]:
        return x
    image = x.flatten(0, 1).mT.unflatten(2, teacher_grid[1:])
    image = _resized(image, student_grid[1:])
    matched: Tensor = image.flatten(2).mT.unflatten(0, x.shape[:2])
    return matched


def match_grids(teachers: Sequence[tuple[Tensor, Grid]], student_grid: Grid) -> list[Tensor]:
    """Resamples the tokens of several teachers to the student's grid, all to the same frames.

    A first frame that one of them left out is left out of all: take the last frames of the student.

    Args:
        teachers: tokens (B, T, P, D) and grid of each.
        student_grid: (T, H, W) of the student.

    Returns:
        As `match_grid`, in the same order, with equally many frames.

    Raises:
        ValueError: the frames of two grids do not correspond.
    """
    matched = [match_grid(tokens_BTPD, grid, student_grid) for tokens_BTPD, grid in teachers]
    frames = min(tokens_BTPD.shape[1] for tokens_BTPD in matched)
    return [tokens_BTPD[:, -frames:] for tokens_BTPD in matched]


def frame_groups(teacher_BTPD: Tensor, teacher_grid: Grid, student_grid: Grid) -> list[Tensor]:
    """Resamples teacher tokens in space, and puts the frames of each student frame side by side.

    For what is made of a teacher's frame before the mean over a group is taken, where `match_grid`
    takes the mean of the tokens.

    Args:
        teacher_BTPD: on `teacher_grid`.
        teacher_grid: (T, H, W) of the teacher.
        student_grid: (T, H, W) of the student.

    Returns:
        (B, T', G, P, D) for student frames in a row that have G teacher frames each, in order: of
        all at once, or of the first and of the later ones. A first student frame without a
        counterpart is in none.

    Raises:
        ValueError: the frames of the two grids do not correspond.
    """
    group, keeps_first = _correspondence(student_grid, teacher_grid)
    spatial_BTPD = match_grid(teacher_BTPD, teacher_grid, (teacher_grid[0], *student_grid[1:]))
    alone = int(keeps_first and group > 1)
    first, later = spatial_BTPD[:, :alone], spatial_BTPD[:, alone:]
    grouped = later.unflatten(1, (-1, group))
    return [first[:, :, None], grouped] if alone else [grouped]


def _resized(image_MDHW: Tensor, size: tuple[int, int]) -> Tensor:
    mode = _space_mode(image_MDHW.shape[2:], size)
    resized: Tensor = F.interpolate(image_MDHW, size=size, mode=mode)
    return resized


def _space_mode(before: Sequence[int], after: Sequence[int]) -> str:
    """Means where the grid shrinks, since interpolation would skip tokens there."""
    return "area" if after[0] <= before[0] and after[1] <= before[1] else "bilinear"


def match_student(student_BND: Tensor, student_grid: Grid, teacher_grid: Grid) -> Tensor:
    """Resamples student tokens to the teacher's grid: linear in time, bilinear in space.

    A teacher grid that is coarser in space gets averages.

    The first frame is kept by itself where the teacher saw it by itself, and dropped where the
    teacher left it out; only the frames after it are interpolated (VideoREPA, released code, drops
    it always).

    Args:
        student_BND: on `student_grid`.
        student_grid: (T, H, W) of the student.
        teacher_grid: (T, H, W) of the teacher.

    Returns:
        (B, T, P, D) on the teacher's grid, in float32 (float64 from float64) if resampled.

    Raises:
        ValueError: the frames of the two grids do not correspond.
    """
    group, keeps_first = _correspondence(student_grid, teacher_grid)
    frames_BTPD = student_frames(student_BND, student_grid, teacher_grid)
    if frames_BTPD.shape[1] == teacher_grid[0] and student_grid[1:] == teacher_grid[1:]:
        return frames_BTPD
    video = _float(frames_BTPD).movedim(3, 1)
    alone = int(keeps_first and group > 1)
    size = (teacher_grid[0] - alone, video.shape[3])
    later = F.interpolate(video[:, :, alone:], size=size, mode="bilinear")
    video = torch.cat([video[:, :, :alone], later], dim=2)
    image = video.movedim(2, 1).flatten(0, 1).unflatten(2, student_grid[1:])
    image = _resized(image, teacher_grid[1:]).unflatten(0, (-1, teacher_grid[0]))
    resampled: Tensor = image.flatten(3).movedim(2, 3)
    return resampled


def common_grid(
    student_BND: Tensor,
    student_grid: Grid,
    teacher_BTPD: Tensor,
    teacher_grid: Grid,
    side: Side,
) -> tuple[Tensor, Tensor]:
    """Brings both to the grid of one side, (B, T, P, D) each: `student_on` and `teacher_on`.

    Several blocks share one teacher side: call `teacher_on` once for all of them.

    Raises:
        ValueError: the frames of the two grids do not correspond.
    """
    return (
        student_on(side, student_BND, student_grid, teacher_grid),
        teacher_on(side, teacher_BTPD, teacher_grid, student_grid),
    )


def teacher_on(side: Side, teacher_BTPD: Tensor, teacher_grid: Grid, student_grid: Grid) -> Tensor:
    """Brings the teacher's tokens to the grid of one side: `match_grid`, or as they are."""
    if side == "teacher":
        return teacher_BTPD
    return match_grid(teacher_BTPD, teacher_grid, student_grid)


def student_on(side: Side, student_BND: Tensor, student_grid: Grid, teacher_grid: Grid) -> Tensor:
    """Brings the student's tokens to the grid of one side: `match_student`, or split by frame."""
    on_side = match_student if side == "teacher" else student_frames
    return on_side(student_BND, student_grid, teacher_grid)


def student_frames(student_BND: Tensor, student_grid: Grid, teacher_grid: Grid) -> Tensor:
    """Splits student tokens by frame, (B, T, P, D), without a first frame that is to be dropped."""
    frames_BTPD: Tensor = student_BND.unflatten(1, (student_grid[0], -1))
    return frames_BTPD[:, 1:] if drops_first_frame(student_grid, teacher_grid) else frames_BTPD


def drops_first_frame(student_grid: Grid, teacher_grid: Grid) -> bool:
    """Says whether the student's first frame has no counterpart in the teacher.

    Raises:
        ValueError: the frames of the two grids do not correspond.
    """
    return not _correspondence(student_grid, teacher_grid).keeps_first


def pool_masks(masks_BTHW: Tensor, grid: Grid) -> Tensor:
    """Averages masks of pixel frames over the tokens of a grid, (B, T, P) in [0, 1], float32.

    Each token gets the share of its area that the mask covers, and the mean over its frames: with F
    pixel frames, a grid of F frames takes them one by one, one of 1 + (F-1)/g keeps the first by
    itself, one of (F-1)/g leaves the first out.

    Args:
        masks_BTHW: bool or numbers in [0, 1], T counts pixel frames.
        grid: (T, H, W) of the tokens.

    Raises:
        ValueError: the frames do not correspond.
    """
    pixel_frames, frames = masks_BTHW.shape[1], grid[0]
    masks = F.interpolate(masks_BTHW.float(), size=grid[1:], mode="area").flatten(2)
    if pixel_frames == frames:
        return masks
    if 1 < frames < pixel_frames and (pixel_frames - 1) % (frames - 1) == 0:
        groups = masks[:, 1:].unflatten(1, (frames - 1, -1))
        return torch.cat([masks[:, :1], groups.mean(2)], dim=1)
    if 0 < frames < pixel_frames and (pixel_frames - 1) % frames == 0:
        pooled: Tensor = masks[:, 1:].unflatten(1, (frames, -1)).mean(2)
        return pooled
    raise ValueError(f"cannot match masks of {pixel_frames} frames to the token grid {grid}")


def covered_share(masks_THW: Tensor, grid: Grid) -> Tensor:
    """Share of each token's area that a mask covers, (T, P): `pool_masks` of one clip.

    Images of their own count as frames, one each. A token is foreground where the share is above
    `FOREGROUND`.
    """
    return pool_masks(masks_THW[None], grid)[0]


def share_is_decided(share: Tensor, undecided: Tensor, threshold: float = FOREGROUND) -> Tensor:
    """Says where undecided pixels cannot change on which side of a threshold a share is, bool.

    Args:
        share: of each token's area that is known to be covered.
        undecided: share of it that may be covered or not.
        threshold: what is covered is above it.
    """
    return (share > threshold) | (share + undecided <= threshold)


def patch_tokens(latents_BCTHW: Tensor, patch_HW: tuple[int, int]) -> Tensor:
    """Flattens latents patch by patch, as a transformer embeds them: (B, T, P, C*h*w).

    Args:
        latents_BCTHW: T latent frames, of which each is a frame of tokens.
        patch_HW: (h, w) of a patch, which divide H and W.

    Raises:
        ValueError: they do not.
    """
    height, width = patch_HW
    if latents_BCTHW.shape[3] % height or latents_BCTHW.shape[4] % width:
        raise ValueError(
            f"latents {tuple(latents_BCTHW.shape)} do not divide into patches {height}x{width}"
        )
    patches = latents_BCTHW.unflatten(4, (-1, width)).unflatten(3, (-1, height))
    # (B, C, T, rows, h, columns, w)
    tokens_BTPD: Tensor = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)
    return tokens_BTPD


def describe(student_grid: Grid, teacher_grid: Grid, side: Side = "student") -> str:
    """Says in one line how two grids meet on that of `side`, for the log of a run.

    `match_grid` brings the teacher's tokens to the student's grid, `match_student` the other way
    round.
    """
    group, keeps_first = _correspondence(student_grid, teacher_grid)
    steps = [] if keeps_first else ["first student frame dropped"]
    if group > 1:
        steps.append("linear in time" if side == "teacher" else "group mean in time")
    if teacher_grid[1:] != student_grid[1:]:
        sizes = (student_grid[1:], teacher_grid[1:])
        mode = _space_mode(*(sizes if side == "teacher" else sizes[::-1]))
        steps.append(f"{'mean' if mode == 'area' else mode} in space")
    how = ", ".join(steps) or "equal"
    arrow = "->" if side == "teacher" else "<-"
    return f"{student_grid} student {arrow} {teacher_grid} teacher: {how}"


class _Correspondence(NamedTuple):
    """How many teacher frames each student frame after the first has; whether the first has one."""

    group: int
    keeps_first: bool


def _correspondence(student_grid: Grid, teacher_grid: Grid) -> _Correspondence:
    frames, later = teacher_grid[0], student_grid[0] - 1
    if frames == student_grid[0]:
        return _Correspondence(1, True)
    if 0 < later < frames and (frames - 1) % later == 0:
        return _Correspondence((frames - 1) // later, True)
    if 0 < later <= frames and frames % later == 0:
        return _Correspondence(frames // later, False)
    raise ValueError(
        f"cannot match teacher grid {teacher_grid} to student grid {student_grid}: a student of T "
        "frames needs a teacher of T, of 1 + g(T-1), or of g(T-1) frames"
    )


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
