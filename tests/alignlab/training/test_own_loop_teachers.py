"""Teachers of one's own that give `alignlab.attach` something else than they were asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab import Clips
from alignlab.losses.objective import Features
from attached_objectives import (
    FRAMES,
    REPA,
    Attach,
    Colours,
    clips,
    refused,
    run,
)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.0, "gives the same features whatever it sees"), (float("nan"), "not finite")],
)
def test_a_teacher_that_says_nothing(
    scale: float, expected: str, attached: Attach, transformer: nn.Module
) -> None:
    alignment = attached(teacher=Colours(scale), a=REPA)
    run(alignment, transformer)
    with refused(rf"teachers\.mine: .*{expected}"):
        alignment(clips(), 0)


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("encode", lambda frames, grid: frames, "Features, not Tensor"),
        ("dim", 4, "Features of width 4 on the grid 2x2 .*, not of width 3 on 2x2"),
        (
            "encode",
            lambda frames, grid: Features(torch.rand(len(frames), 1, 1, 3), (1, 1, 1)),
            "Features of width 3 on the grid 2x2 .*, not of width 3 on 1x1",
        ),
        (
            "encode",
            lambda frames, grid: Colours().encode(frames[:, ::2], grid),
            "Features of 1 clip with 5 frames, as many as it is given, not of 1 with 3",
        ),
        (
            "encode",
            lambda frames, grid: Colours().encode(frames.repeat(2, 1, 1, 1, 1), grid),
            "Features of 1 clip .*, not of 2 with 5",
        ),
        (
            "encode",
            lambda frames, grid: cast_to(torch.float64, Colours().encode(frames, grid)),
            "Features in one of float32, bfloat16, float16, not in float64",
        ),
        (
            "encode",
            lambda frames, grid: cast_to(torch.int64, Colours().encode(frames, grid)),
            "Features in one of .*, not in int64",
        ),
    ],
)
def test_a_teacher_of_ones_own_that_gives_something_else(
    attribute: str, value: Any, expected: str, attached: Attach, transformer: nn.Module
) -> None:
    teacher = Colours()
    setattr(teacher, attribute, value)
    alignment = attached(teacher=teacher, a=REPA)
    run(alignment, transformer)
    with refused(rf"teachers\.mine: encode must give alignlab\.losses\.objective\.{expected}"):
        alignment(clips(), 0)


def cast_to(dtype: torch.dtype, features: Features) -> Features:
    return Features(features.tokens_BTPD.to(dtype), features.grid)


def long_clips(**fields: Any) -> Clips:
    """Nine frames."""
    frames = torch.cat([FRAMES, FRAMES[:, 1:]], dim=1)
    return clips(latent_shape=(3, 4, 4), frames_BTHWC=frames, **fields)


def test_a_teacher_that_loses_frames_of_longer_clips_only(
    attached: Attach, transformer: nn.Module
) -> None:
    teacher: Any = Colours()
    teacher.encode = lambda frames, grid: Colours().encode(frames[:, :5], grid)
    alignment = attached(teacher=teacher, a=REPA)
    run(alignment, transformer)
    alignment(clips(), 0)
    run(alignment, transformer, frames=3)
    with refused(r"teachers\.mine: encode must give .* 9 frames, .*, not of 1 with 5"):
        alignment(long_clips(), 1)


@pytest.mark.parametrize(("first", "is_right"), [(0, False), (1, True), (6, False), (7, True)])
def test_a_video_teacher_shares_the_frames_after_the_first(
    first: int, is_right: bool, attached: Attach, transformer: nn.Module
) -> None:
    teacher: Any = Colours(is_video=True)
    teacher.encode = lambda frames, grid: Colours().encode(frames[:, first:], grid)
    alignment = attached(teacher=teacher, a=REPA)
    run(alignment, transformer, frames=3)
    if is_right:
        assert alignment(long_clips(), 0).loss.requires_grad
        return
    with refused(rf"teachers\.mine: encode must .* frames that share the 8 .* with {9 - first}"):
        alignment(long_clips(), 0)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_teacher_that_raises_is_a_line(
    calls: int, attached: Attach, transformer: nn.Module
) -> None:
    """In the first look at it, or later."""
    teacher: Any = Colours()
    seen: list[Tensor] = []

    def encode(frames: Tensor, grid: tuple[int, int]) -> Features:
        seen.append(frames)
        if len(seen) > calls:
            raise KeyError("no weights\nfor these")
        return Colours().encode(frames, grid)

    teacher.encode = encode
    alignment = attached(teacher=teacher, a=REPA)
    run(alignment, transformer)
    told = r"it raised KeyError: .*no weights.* \(test_own_loop_teachers\.py:"
    with refused(rf"teachers\.mine: encode: {told}") as error:
        alignment(clips(), 0)
    assert isinstance(error.value.__cause__, KeyError)
    assert len(seen) == calls + 1


def test_a_teacher_is_looked_at_where_its_frames_are(
    attached: Attach, transformer: nn.Module
) -> None:
    teacher: Any = Colours()
    seen: list[str] = []

    def encode(frames: Tensor, grid: tuple[int, int]) -> Features:
        seen.append(frames.device.type)
        return Features(torch.rand(1, frames.shape[1], grid[0] * grid[1], 3), (5, *grid))

    teacher.encode = encode
    alignment = attached(teacher=teacher, a=REPA)
    run(alignment, transformer)
    alignment(clips(frames_BTHWC=FRAMES.to("meta")), 0)  # stands for a GPU
    assert seen == ["meta"] * 4
