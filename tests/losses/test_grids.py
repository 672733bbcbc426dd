"""How teacher tokens come onto the student's grid."""

import pytest
import torch
from torch import Tensor

from alignlab.losses.grids import describe, match_grid
from alignlab.losses.objective import Grid


def frame_numbers(grid: Grid) -> Tensor:
    """Gives features (1, T, P, 2) whose first channel is the frame and second the column."""
    frames, height, width = grid
    time = torch.arange(frames, dtype=torch.float32).view(-1, 1, 1).expand(grid)
    column = torch.arange(width, dtype=torch.float32).expand(grid)
    return torch.stack([time, column], -1).reshape(1, frames, height * width, 2)


def test_equal_grids_are_returned_as_they_are() -> None:
    teacher = frame_numbers((3, 2, 4)).bfloat16()
    assert match_grid(teacher, (3, 2, 4), (3, 2, 4)) is teacher


def test_group_mean_keeps_the_first_frame_and_averages_the_others() -> None:
    matched = match_grid(frame_numbers((9, 2, 4)), (9, 2, 4), (3, 2, 4))
    assert matched.shape == (1, 3, 8, 2)
    assert matched[0, :, 5, 0].tolist() == [0.0, 2.5, 6.5]
    assert matched[0, 0, :, 1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_select_takes_the_last_frame_of_each_group() -> None:
    matched = match_grid(frame_numbers((9, 2, 4)), (9, 2, 4), (3, 2, 4), time="select")
    assert matched[0, :, 0, 0].tolist() == [0.0, 4.0, 8.0]


@pytest.mark.parametrize("space", ["bilinear", "area"])
def test_space_is_resampled_frame_by_frame(space: str) -> None:
    teacher = frame_numbers((2, 4, 8))
    matched = match_grid(teacher, (2, 4, 8), (2, 2, 4), space=space)  # type: ignore[arg-type]
    assert matched.shape == (1, 2, 8, 2)
    assert matched[0, 1, :, 0].tolist() == [1.0] * 8
    assert matched[0, 0, :4, 1].tolist() == [0.5, 2.5, 4.5, 6.5]


def test_space_modes_differ_when_the_teacher_is_much_finer() -> None:
    teacher = torch.randn(1, 1, 64, 3, generator=torch.Generator().manual_seed(0))
    bilinear = match_grid(teacher, (1, 8, 8), (1, 2, 2))
    area = match_grid(teacher, (1, 8, 8), (1, 2, 2), space="area")
    assert not torch.allclose(bilinear, area)
    torch.testing.assert_close(area.mean(2), teacher.mean(2))


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid", "line"),
    [
        ((3, 4, 4), (3, 4, 4), "(3, 4, 4) student <- (3, 4, 4) teacher: equal"),
        ((3, 4, 4), (9, 4, 4), "(3, 4, 4) student <- (9, 4, 4) teacher: group mean in time"),
        ((3, 4, 4), (3, 8, 8), "(3, 4, 4) student <- (3, 8, 8) teacher: bilinear in space"),
        (
            (3, 4, 4),
            (5, 8, 8),
            "(3, 4, 4) student <- (5, 8, 8) teacher: group mean in time, bilinear in space",
        ),
    ],
)
def test_describe_says_what_happens(student_grid: Grid, teacher_grid: Grid, line: str) -> None:
    assert describe(student_grid, teacher_grid) == line


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"),
    [
        ((3, 2, 2), (8, 2, 2)),
        ((5, 2, 2), (3, 2, 2)),
        ((1, 2, 2), (5, 2, 2)),
        ((3, 2, 2), (1, 2, 2)),
    ],
)
def test_frames_that_do_not_correspond_are_refused(student_grid: Grid, teacher_grid: Grid) -> None:
    with pytest.raises(ValueError) as error:
        match_grid(frame_numbers(teacher_grid), teacher_grid, student_grid)
    assert str(student_grid) in str(error.value) and str(teacher_grid) in str(error.value)
    with pytest.raises(ValueError, match="cannot match"):
        describe(student_grid, teacher_grid)
