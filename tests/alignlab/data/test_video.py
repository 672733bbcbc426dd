"""Clips in and out of real files: which frames are picked, geometry, colours, errors."""

import struct
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from alignlab.data.decode import ClipError
from alignlab.data.video import check_clip, decode_clip, write_mp4
from alignlab.errors import UserError

SIZE = (32, 32)


def numbered_video(num_frames: int, size_HW: tuple[int, int] = SIZE) -> Tensor:
    """Frame i is flat gray 20 + 3 i, so that a decoded frame tells its number."""
    levels = 20 + 3 * torch.arange(num_frames, dtype=torch.uint8)
    return levels[:, None, None, None].expand(num_frames, *size_HW, 3)


def numbers(video_THWC: Tensor) -> list[int]:
    return [round((float(level) - 20) / 3) for level in video_THWC.float().mean(dim=(1, 2, 3))]


def decoded(
    path: Path, *, frames: int, fps: float, size_HW: tuple[int, int], start_s: float = 0.0
) -> Tensor:
    """The frames as a data set without masks reads them: by seeking."""
    clip = decode_clip(path, frames=frames, fps=fps, size_HW=size_HW, start_s=start_s, seek=True)
    return clip.video_THWC


def write_timed(path: Path, times_ms: Sequence[int], *, keyframe_every: int = 4) -> None:
    """A numbered video whose frames are shown at the given times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.gop_size = keyframe_every
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for time_ms, frame_HWC in zip(times_ms, numbered_video(len(times_ms)), strict=True):
            frame = av.VideoFrame.from_ndarray(frame_HWC.contiguous().numpy(), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_same_rate_gives_every_frame_once(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", numbered_video(20), fps=10)
    video_THWC = decoded(tmp_path / "a.mp4", frames=20, fps=10, size_HW=SIZE)
    assert video_THWC.dtype == torch.uint8 and video_THWC.shape == (20, *SIZE, 3)
    assert numbers(video_THWC) == list(range(20))


@pytest.mark.parametrize("source_fps", [25, 30000 / 1001, 24, 12, 5])
def test_any_rate_keeps_its_speed(tmp_path: Path, source_fps: float) -> None:
    write_mp4(tmp_path / "a.mp4", numbered_video(32), fps=source_fps)
    video_THWC = decoded(tmp_path / "a.mp4", frames=9, fps=8, size_HW=SIZE)
    assert numbers(video_THWC) == [int((k / 8 + 0.6e-3) * source_fps) for k in range(9)]


def test_variable_rate_holds_the_frame_that_is_shown(tmp_path: Path) -> None:
    write_timed(tmp_path / "a.mp4", [0, 100, 130, 160, 600, 700, 740, 900])
    video_THWC = decoded(tmp_path / "a.mp4", frames=9, fps=10, size_HW=SIZE)
    assert numbers(video_THWC) == [0, 1, 3, 3, 3, 3, 4, 5, 6]


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts", "mov", "flv"])
def test_containers_that_round_or_shift_times(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_timed(path, [round(1000 * k / 30) for k in range(40)])
    assert numbers(decoded(path, frames=40, fps=30, size_HW=SIZE)) == list(range(40))
    check_clip(path, frames=40, fps=30)
    check_clip(path, frames=10, fps=30, start_s=1.0)
    with pytest.raises(ClipError, match="40 frames at 30 fps, 41 are needed"):
        check_clip(path, frames=41, fps=30)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts", "mov", "flv"])
@pytest.mark.parametrize("start_frame", [1, 7, 18])
def test_start_is_exact_in_every_container(tmp_path: Path, suffix: str, start_frame: int) -> None:
    path = tmp_path / f"a.{suffix}"
    write_timed(path, range(0, 3000, 100), keyframe_every=6)
    start_s = start_frame / 10
    video_THWC = decoded(path, frames=5, fps=5, size_HW=SIZE, start_s=start_s)
    assert numbers(video_THWC) == [start_frame + 2 * k for k in range(5)]
    clip = decode_clip(path, frames=5, fps=5, size_HW=SIZE, start_s=start_s)
    assert torch.equal(clip.video_THWC, video_THWC)
    assert list(clip.frame_indices) == numbers(video_THWC)


@pytest.mark.parametrize("num_frames", [15, 16, 17])
def test_too_short_says_how_many_frames_there_are(tmp_path: Path, num_frames: int) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, numbered_video(num_frames), fps=16)
    if num_frames >= 16:
        check_clip(path, frames=8, fps=8)
        assert len(decoded(path, frames=8, fps=8, size_HW=SIZE)) == 8
    message = rf"a\.mp4: is too short: {-(-num_frames // 2)} frames at 8 fps, 10 are needed"
    for check in (
        lambda: check_clip(path, frames=10, fps=8),
        lambda: decoded(path, frames=10, fps=8, size_HW=SIZE),
    ):
        with pytest.raises(ClipError, match=message):
            check()


def test_too_short_counts_from_the_start(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", numbered_video(20), fps=10)
    check_clip(tmp_path / "a.mp4", frames=5, fps=10, start_s=1.5)
    with pytest.raises(ClipError, match=r"5 frames at 10 fps from 1\.5 s on, 9 are needed"):
        decoded(tmp_path / "a.mp4", frames=9, fps=10, size_HW=SIZE, start_s=1.5)
    with pytest.raises(ClipError, match=r"0 frames at 10 fps from 7 s on"):
        check_clip(tmp_path / "a.mp4", frames=9, fps=10, start_s=7)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "garbage.mp4").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty.mp4").write_bytes(b"")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    reasons = {
        "garbage.mp4": "cannot be read",
        "empty.mp4": "cannot be read",
        "missing.mp4": "cannot be read",
        "sound.wav": "has no video stream",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            check_clip(tmp_path / name, frames=5, fps=8)
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            decoded(tmp_path / name, frames=5, fps=8, size_HW=SIZE)


def test_probe_sees_that_a_download_was_cut_off(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (30, 64, 64, 3), dtype=torch.uint8)
    write_mp4(tmp_path / "whole.mp4", noise, fps=10)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    check_clip(tmp_path / "whole.mp4", frames=30, fps=10)
    with pytest.raises(ClipError, match=r"cut\.mp4"):
        check_clip(tmp_path / "cut.mp4", frames=30, fps=10)


def test_resize_covers_and_crops_the_centre(tmp_path: Path) -> None:
    """A wide clip of vertical bands: the crop keeps the middle ones at their proportions."""
    video_THWC = torch.zeros(5, 64, 192, 3, dtype=torch.uint8)
    video_THWC[:, :, 64:96, 0] = 200
    video_THWC[:, :, 96:128, 2] = 200
    write_mp4(tmp_path / "a.mp4", video_THWC, fps=8)
    frame_HWC = decoded(tmp_path / "a.mp4", frames=5, fps=8, size_HW=(32, 32))[2].int()
    assert (frame_HWC[:, 2:14, 0] > 150).all() and (frame_HWC[:, 2:14, 2] < 60).all()
    assert (frame_HWC[:, 18:30, 2] > 150).all() and (frame_HWC[:, 18:30, 0] < 60).all()


def test_pixels_that_are_not_square_are_widened(tmp_path: Path) -> None:
    """Stored 32x32 with pixels twice as wide as high: the square crop is the middle half."""
    path = tmp_path / "a.mkv"
    frame_HWC = torch.zeros(32, 32, 3, dtype=torch.uint8)
    frame_HWC[:, 8:24] = 200
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(frame_HWC.numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video_THWC = decoded(path, frames=5, fps=8, size_HW=(32, 32))
    assert (video_THWC[:, :, 3:-3] > 170).all()


def test_phone_video_is_turned_upright(tmp_path: Path) -> None:
    """The track header says to turn the picture by 90 degrees clockwise, as phones write it."""
    path = tmp_path / "a.mp4"
    video_THWC = torch.zeros(5, 32, 64, 3, dtype=torch.uint8)
    video_THWC[:, :, :32] = 200
    write_mp4(path, video_THWC, fps=8)
    contents = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    matrix = contents.index(identity, contents.index(b"tkhd"))
    contents[matrix : matrix + 36] = clockwise
    path.write_bytes(contents)
    frame_HWC = decoded(path, frames=5, fps=8, size_HW=(64, 32))[0]
    assert (frame_HWC[:28] > 170).all() and (frame_HWC[36:] < 30).all()


def test_written_colours_come_back(tmp_path: Path) -> None:
    colors = torch.tensor([[220, 40, 40], [40, 200, 60], [50, 60, 210], [230, 220, 40]])
    video_THWC = colors.to(torch.uint8)[:, None, None].expand(4, 64, 64, 3)
    write_mp4(tmp_path / "deep" / "a.mp4", video_THWC, fps=8)
    back_THWC = decoded(tmp_path / "deep" / "a.mp4", frames=4, fps=8, size_HW=(64, 64))
    assert (back_THWC.int() - video_THWC.int()).abs().max() <= 6
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.mp4"]


def test_odd_sizes_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even size"):
        write_mp4(tmp_path / "a.mp4", torch.zeros(5, 33, 32, 3, dtype=torch.uint8), fps=8)
    assert not list(tmp_path.iterdir())
