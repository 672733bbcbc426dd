"""How tokens of student and teacher, and masks, come onto one grid."""

from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.losses.grids import (
    common_grid,
    describe,
    drops_first_frame,
    match_grid,
    match_student,
    pool_masks,
    student_frames,
)
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


def test_space_is_resampled_frame_by_frame() -> None:
    teacher = frame_numbers((2, 4, 8))
    matched = match_grid(teacher, (2, 4, 8), (2, 2, 4))
    assert matched.shape == (1, 2, 8, 2)
    assert matched[0, 1, :, 0].tolist() == [1.0] * 8
    assert matched[0, 0, :4, 1].tolist() == [0.5, 2.5, 4.5, 6.5]


def test_a_teacher_that_left_the_first_frame_out_gives_one_frame_less() -> None:
    teacher = frame_numbers((4, 2, 4))
    matched = match_grid(teacher, (4, 2, 4), (3, 2, 4))
    assert matched.shape == (1, 2, 8, 2)
    assert matched[0, :, 5, 0].tolist() == [0.5, 2.5]
    one_by_one = match_grid(frame_numbers((2, 4, 8)), (2, 4, 8), (3, 2, 4))
    assert one_by_one.shape == (1, 2, 8, 2)
    assert one_by_one[0, :, 5, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("student_frames_count", "teacher_frames", "dropped"),
    [(3, 3, False), (3, 5, False), (21, 81, False), (3, 4, True), (21, 40, True), (21, 20, True)],
)
def test_the_first_frame_is_dropped_if_the_teacher_left_it_out(
    student_frames_count: int, teacher_frames: int, dropped: bool
) -> None:
    student, teacher = (student_frames_count, 2, 2), (teacher_frames, 3, 3)
    assert drops_first_frame(student, teacher) == dropped
    tokens = frame_numbers(student).flatten(1, 2)
    kept = student_frames(tokens, student, teacher)
    assert kept.shape == (1, student_frames_count - dropped, 4, 2)
    assert kept[0, :, 3, 0].tolist() == list(range(int(dropped), student_frames_count))
    matched = match_grid(frame_numbers(teacher), teacher, student)
    assert matched.shape == kept.shape


def test_two_student_frames_are_read_as_seen_one_by_one() -> None:
    """A student of two frames fits in several ways: the upper one is meant."""
    assert not drops_first_frame((2, 1, 1), (2, 1, 1))
    assert not drops_first_frame((2, 1, 1), (5, 1, 1))


def test_student_is_interpolated_after_its_first_frame() -> None:
    student = frame_numbers((3, 2, 4)).flatten(1, 2)
    matched = match_student(student, (3, 2, 4), (9, 2, 4))
    assert matched.shape == (1, 9, 8, 2)
    # frames 1 and 2 over eight steps, centres aligned, ends held
    expected = [0.0, 1.0, 1.0, 1.125, 1.375, 1.625, 1.875, 2.0, 2.0]
    assert matched[0, :, 5, 0].tolist() == pytest.approx(expected)
    assert matched[0, 4, :, 1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_student_without_its_first_frame_is_interpolated_as_videorepa_does() -> None:
    student = frame_numbers((4, 2, 4)).flatten(1, 2)
    matched = match_student(student, (4, 2, 4), (6, 2, 4))
    assert matched[0, :, 5, 0].tolist() == pytest.approx([1.0, 1.25, 1.75, 2.25, 2.75, 3.0])


def test_student_is_resampled_in_space_as_the_teacher_would_be() -> None:
    tokens = torch.randn(2, 3, 32, 5, generator=torch.Generator().manual_seed(0))
    expected = match_grid(tokens, (3, 4, 8), (3, 3, 5))
    matched = match_student(tokens.flatten(1, 2), (3, 4, 8), (3, 3, 5))
    torch.testing.assert_close(matched, expected)
    first = match_student(tokens.flatten(1, 2), (3, 4, 8), (5, 3, 5))[:, 0]
    torch.testing.assert_close(first, expected[:, 0])


def test_student_on_the_teachers_grid_is_only_split_by_frame() -> None:
    tokens = torch.randn(2, 12, 5, dtype=torch.bfloat16)
    matched = match_student(tokens, (3, 2, 2), (3, 2, 2))
    assert matched.dtype == torch.bfloat16 and torch.equal(matched.flatten(1, 2), tokens)
    dropped = match_student(tokens, (3, 2, 2), (2, 2, 2))
    assert torch.equal(dropped.flatten(1, 2), tokens[:, 4:])
    double = match_student(tokens.double(), (3, 2, 2), (3, 4, 4))
    assert double.dtype == torch.float64


def test_gradient_passes_the_interpolation() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 12, 2, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: match_student(x, (3, 2, 2), (5, 3, 2)), (tokens,))


@pytest.mark.parametrize("teacher_grid", [(3, 2, 2), (9, 3, 3), (4, 2, 2), (4, 4, 4)])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_common_grid_is_that_of_the_side(teacher_grid: Grid, side: Any) -> None:
    student_grid = (3, 2, 2)
    student, teacher = frame_numbers(student_grid).flatten(1, 2), frame_numbers(teacher_grid)
    ours, theirs = common_grid(student, student_grid, teacher, teacher_grid, side)
    assert ours.shape == theirs.shape
    if side == "teacher":
        assert theirs is teacher
    else:
        assert torch.equal(ours, student_frames(student, student_grid, teacher_grid))


def test_masks_become_shares_of_area_and_time() -> None:
    masks = torch.zeros(1, 9, 4, 4, dtype=torch.bool)
    masks[0, 0, :2, :1] = True  # half of the first token of frame 0
    masks[0, 1:4, :2, :2] = True  # the first token in 3 of the frames 1 to 4
    masks[0, 8, 3, 3] = True  # a quarter of the last token in frame 8
    pooled = pool_masks(masks, (3, 2, 2))
    assert pooled.dtype == torch.float32
    assert pooled[0].tolist() == [[0.5, 0, 0, 0], [0.75, 0, 0, 0], [0, 0, 0, 0.0625]]
    without_first = pool_masks(masks, (4, 2, 2))
    assert without_first[0, :, 0].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert pool_masks(masks, (9, 2, 2))[0, :, 0].tolist() == [0.5, 1, 1, 1, 0, 0, 0, 0, 0]


def test_masks_of_all_pixels_cover_every_token_of_any_grid() -> None:
    assert (pool_masks(torch.ones(2, 9, 7, 5, dtype=torch.bool), (3, 3, 4)) == 1).all()


@pytest.mark.parametrize("grid", [(5, 2, 2), (10, 2, 2), (17, 2, 2)])
def test_masks_of_frames_that_do_not_correspond_are_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match=r"masks of 8 frames to the token grid \("):
        pool_masks(torch.ones(1, 8, 4, 4), grid)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid", "line"),
    [
        ((3, 4, 4), (3, 4, 4), "(3, 4, 4) student <- (3, 4, 4) teacher: equal"),
        ((3, 4, 4), (9, 4, 4), "(3, 4, 4) student <- (9, 4, 4) teacher: group mean in time"),
        ((3, 4, 4), (3, 8, 8), "(3, 4, 4) student <- (3, 8, 8) teacher: mean in space"),
        (
            (3, 4, 4),
            (5, 8, 8),
            "(3, 4, 4) student <- (5, 8, 8) teacher: group mean in time, mean in space",
        ),
        (
            (3, 4, 4),
            (4, 4, 4),
            "(3, 4, 4) student <- (4, 4, 4) teacher: first student frame dropped, group mean in "
            "time",
        ),
        (
            (3, 4, 4),
            (2, 4, 4),
            "(3, 4, 4) student <- (2, 4, 4) teacher: first student frame dropped",
        ),
    ],
)
def test_describe_says_what_happens(student_grid: Grid, teacher_grid: Grid, line: str) -> None:
    assert describe(student_grid, teacher_grid) == line


def test_describe_names_the_other_direction() -> None:
    assert describe((3, 4, 4), (9, 8, 8)).endswith("group mean in time, mean in space")
    line = describe((3, 4, 4), (4, 8, 8), side="teacher")
    assert line == (
        "(3, 4, 4) student -> (4, 8, 8) teacher: first student frame dropped, linear in time, "
        "bilinear in space"
    )


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"),
    [
        ((4, 2, 2), (8, 2, 2)),
        ((5, 2, 2), (3, 2, 2)),
        ((1, 2, 2), (5, 2, 2)),
        ((3, 2, 2), (1, 2, 2)),
    ],
)
def test_frames_that_do_not_correspond_are_refused(student_grid: Grid, teacher_grid: Grid) -> None:
    with pytest.raises(ValueError) as error:
        match_grid(frame_numbers(teacher_grid), teacher_grid, student_grid)
    with pytest.raises(ValueError, match="cannot match"):
        match_student(frame_numbers(student_grid).flatten(1, 2), student_grid, teacher_grid)
    assert str(student_grid) in str(error.value) and str(teacher_grid) in str(error.value)
    with pytest.raises(ValueError, match="cannot match"):
        describe(student_grid, teacher_grid)


def test_a_coarser_grid_gets_averages_of_all_tokens() -> None:
    student = torch.ones(1, 3 * 36, 2, requires_grad=True)
    match_student(student, (3, 6, 6), (9, 2, 2)).square().sum().backward()
    assert student.grad is not None and (student.grad != 0).all()
    columns = match_grid(frame_numbers((9, 6, 6)), (9, 6, 6), (3, 2, 2))
    assert columns[0, 0, :, 1].tolist() == [1.0, 4.0, 1.0, 4.0]
