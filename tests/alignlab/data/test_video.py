"""Clips in and out of real files: which frames are picked, geometry, colours, errors."""

import os
import struct
import subprocess
import sys
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from av.stream import Disposition
from av.video.stream import VideoStream
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


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("copied_to", ["avi", "mp4"])
def test_avi_with_reordered_frames(tmp_path: Path, codec: str, copied_to: str) -> None:
    """AVI stores when frames are decoded, not when they are shown; neither has a copy of it."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        options = {"crf": "10", "x264-params": "bframes=3:b-adapt=0:weightp=0"}
        stream = container.add_stream(codec, rate=16, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = 3, 12
        stream.codec_context.bit_rate = 2_000_000
        for frame_HWC in numbered_video(48):
            frame = av.VideoFrame.from_ndarray(frame_HWC.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if copied_to != "avi":
        copied = path.with_suffix(f".{copied_to}")
        with av.open(str(path)) as source, av.open(str(copied), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        path = copied
    for start_s in (0.0, 1.0, 2.25):
        video_THWC = decoded(path, frames=9, fps=16, size_HW=SIZE, start_s=start_s)
        assert numbers(video_THWC) == list(range(round(16 * start_s), round(16 * start_s) + 9))


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_joined_streams_go_on_where_the_clock_is_set_anew(tmp_path: Path, suffix: str) -> None:
    codec = "libx264" if suffix == "ts" else "mpeg2video"
    options = {"crf": "10"} if suffix == "ts" else {"qscale": "2", "flags": "+qscale"}
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.codec_context.gop_size = 5
        for frame_HWC in numbered_video(20):
            frame = av.VideoFrame.from_ndarray(frame_HWC.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes((tmp_path / f"a.{suffix}").read_bytes() * 3)
    expected = [*range(20)] * 3
    for start in (0, 12, 23, 45):
        video_THWC = decoded(path, frames=13, fps=25, size_HW=SIZE, start_s=start / 25)
        assert numbers(video_THWC) == expected[start : start + 13]
    with pytest.raises(ClipError, match="60 frames at 25 fps, 61 are needed"):
        check_clip(path, frames=61, fps=25)


@pytest.mark.parametrize("kind", ["cover first", "default second", "largest second"])
def test_filmed_stream_is_taken(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        other = container.add_stream("mjpeg" if kind == "cover first" else "libx264", rate=10)
        other.width, other.height = (64, 64) if kind == "default second" else (16, 16)
        other.pix_fmt = "yuvj420p" if kind == "cover first" else "yuv420p"
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        if kind == "cover first":
            other.disposition = Disposition.attached_pic
        if kind == "default second":
            other.disposition = Disposition(0)
            stream.disposition = Disposition.default
        if kind == "largest second":
            other.disposition = stream.disposition = Disposition(0)
        blank = torch.full((other.height, other.width, 3), 250, dtype=torch.uint8).numpy()
        for number, frame_HWC in enumerate(numbered_video(20)):
            if kind != "cover first" or number == 0:
                container.mux(other.encode(av.VideoFrame.from_ndarray(blank, format="rgb24")))
            frame = av.VideoFrame.from_ndarray(frame_HWC.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(other.encode())
        container.mux(stream.encode())
    assert numbers(decoded(path, frames=9, fps=10, size_HW=SIZE)) == list(range(9))


@pytest.mark.parametrize("num_frames", [15, 16, 17])
def test_too_short_says_how_many_frames_there_are(tmp_path: Path, num_frames: int) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, numbered_video(num_frames), fps=16)
    if num_frames >= 16:
        check_clip(path, frames=8, fps=8)
        assert len(decoded(path, frames=8, fps=8, size_HW=SIZE)) == 8
    given = rf"a\.mp4: is too short: {-(-num_frames // 2)} frames at 8 fps"
    message = rf"{given}, 10 are needed \(data\.frames\)"
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


def test_check_sees_that_a_download_was_cut_off(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (30, 64, 64, 3), dtype=torch.uint8)
    write_mp4(tmp_path / "whole.mp4", noise, fps=10)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    check_clip(tmp_path / "whole.mp4", frames=30, fps=10)
    with pytest.raises(ClipError, match=r"cut\.mp4"):
        check_clip(tmp_path / "cut.mp4", frames=30, fps=10)


def test_check_sees_damage_below_the_header(tmp_path: Path) -> None:
    """The index is whole; half a second of the pictures is noise, which decoders try to hide."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (60, 64, 64, 3), dtype=torch.uint8, generator=generator)
    path = tmp_path / "a.mp4"
    write_mp4(path, noise, fps=20)
    contents = bytearray(path.read_bytes())
    for share in range(50, 75):  # a few bytes of every frame there, not the lengths between them
        at = len(contents) * share // 100
        contents[at : at + 64] = bytes(range(64))
    path.write_bytes(contents)
    check_clip(path, frames=20, fps=20)
    for read in (
        lambda: check_clip(path, frames=60, fps=20),
        lambda: decoded(path, frames=60, fps=20, size_HW=SIZE),
    ):
        with pytest.raises(ClipError, match=r"a\.mp4: (is damaged at|cannot be read)"):
            read()


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG"), (1, None)])
def test_hdr_is_seen(tmp_path: Path, transfer: int, name: str | None) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.codec_context.color_trc = transfer
        for frame_HWC in numbered_video(5):
            frame = av.VideoFrame.from_ndarray(frame_HWC.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert check_clip(path, frames=5, fps=10).hdr == name


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


RED, GREEN, BLUE, GRAY = (220, 30, 30), (30, 200, 30), (30, 30, 220), (120, 120, 120)
ONE = 1 << 16  # in the 16.16 fixed point of a track's matrix


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        pytest.param((ONE, 0, 0, ONE), (RED, GREEN, BLUE, GRAY), id="as stored"),
        pytest.param((0, ONE, -ONE, 0), (BLUE, RED, GRAY, GREEN), id="clockwise, as phones do"),
        pytest.param((0, -ONE, ONE, 0), (GREEN, GRAY, RED, BLUE), id="counterclockwise"),
        pytest.param((-ONE, 0, 0, -ONE), (GRAY, BLUE, GREEN, RED), id="half a turn"),
        pytest.param((-ONE, 0, 0, ONE), (GREEN, RED, GRAY, BLUE), id="mirrored"),
        pytest.param((ONE, 0, 0, -ONE), (BLUE, GRAY, RED, GREEN), id="upside down"),
        pytest.param((0, ONE, ONE, 0), (RED, BLUE, GREEN, GRAY), id="transposed, as selfies"),
        pytest.param((0, -ONE, -ONE, 0), (GRAY, GREEN, BLUE, RED), id="the other diagonal"),
    ],
)
def test_picture_is_turned_and_mirrored_as_the_file_says(
    tmp_path: Path, matrix: tuple[int, ...], corners: tuple[tuple[int, ...], ...]
) -> None:
    """Corners in reading order, as `ffmpeg` shows them."""
    path = write_turned(tmp_path / "a.mp4", matrix)
    size_HW = (64, 32) if matrix[0] == 0 else (32, 64)
    frame_HWC = decoded(path, frames=5, fps=8, size_HW=size_HW)[0].int()
    top, left = size_HW[0] // 4, size_HW[1] // 4
    seen = frame_HWC[[top, top, -top, -top], [left, -left, left, -left]]
    assert (seen - torch.tensor(corners)).abs().max() < 25
    assert check_clip(path, frames=5, fps=8).source_size_HW == size_HW


def test_rotation_by_no_right_angle_is_refused(tmp_path: Path) -> None:
    path = write_turned(tmp_path / "a.mp4", (46341, 46341, -46341, 46341))
    for read in (
        lambda: decoded(path, frames=5, fps=8, size_HW=SIZE),
        lambda: check_clip(path, frames=5, fps=8),
    ):
        with pytest.raises(ClipError, match=r"a\.mp4: .* turned by 45 degrees, no multiple of 90"):
            read()


def write_turned(path: Path, matrix: tuple[int, ...]) -> Path:
    """Five frames with a colour in each quarter, and a matrix (a, b, c, d) in the track header."""
    quarters = torch.tensor([[RED, GREEN], [BLUE, GRAY]], dtype=torch.uint8)
    frame_HWC = quarters.repeat_interleave(16, 0).repeat_interleave(32, 1)
    write_mp4(path, frame_HWC.expand(5, 32, 64, 3), fps=8)
    contents = bytearray(path.read_bytes())
    identity = struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    a, b, c, d = matrix
    at = contents.index(identity, contents.index(b"tkhd"))
    contents[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(contents)
    return path


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


ENCODE = """
import hashlib, torch
from alignlab.data.video import encode_mp4
ramp = torch.arange(48).view(1, 48, 1, 1) * 2 + torch.arange(48).view(1, 1, 48, 1)
moved = (ramp + 5 * torch.arange(9).view(9, 1, 1, 1)) % 200 + torch.tensor([0, 20, 50])
video = moved.to(torch.uint8)
print(hashlib.sha256(encode_mp4(video, 8)).hexdigest())
"""


def test_the_bytes_of_a_video_do_not_depend_on_what_memory_held() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", ENCODE],
            env=os.environ | {"MALLOC_PERTURB_": fill},  # glibc: what fresh memory is filled with
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for fill in ("0", "1", "170")
    }
    assert len(digests) == 1
