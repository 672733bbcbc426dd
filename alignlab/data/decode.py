"""Frames of a video file at wanted times, through PyAV.

Times are seconds after the file's first frame. `alignlab.data.video` is the public side.
Shape letters: H height, W width, C channels (RGB).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from alignlab.errors import UserError

# Matroska rounds timestamps to a millisecond, so a frame that is half of one late is on time.
TIME_TOLERANCE_S = 0.6e-3


class ClipError(UserError):
    """A video or image file that cannot be used; the message names the file and the reason.

    Args:
        message: one line.
        kind: a word or two by which such errors are counted.
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame, when it is shown, and the shape of its stored pixels (width / height)."""

    frame: VideoFrame
    time_s: float
    end_s: float
    pixel_aspect: float


def decoded_frames(path: Path, start_s: float = 0.0) -> Iterator[TimedFrame]:
    """Frames in display order from a keyframe at or before `start_s`."""
    if start_s > 0:
        with _open_video(path) as (container, stream):
            _seek(container, stream, start_s)
            timed_frames = (_timed(stream, frame) for frame in container.decode(stream))
            first = next(timed_frames, None)
            if first is not None and first.time_s <= start_s + TIME_TOLERANCE_S:
                yield first
                yield from timed_frames
                return
    # From the file's beginning, also when a container without an index has landed too late.
    with _open_video(path) as (container, stream):
        yield from (_timed(stream, frame) for frame in container.decode(stream))


def frames_at(path: Path, wanted_s: list[float], *, seek: bool) -> Iterator[tuple[int, TimedFrame]]:
    """The frame shown at each wanted time, with its position among the decoded ones.

    Args:
        wanted_s: increasing times. Frames end early when the file does.
        seek: start at a keyframe shortly before the first wanted time; positions then count
            from that keyframe instead of from the file's first frame.
    """
    shown: tuple[int, TimedFrame] | None = None
    num_given = 0
    for index, timed in enumerate(decoded_frames(path, wanted_s[0] if seek else 0.0)):
        while shown is not None and timed.time_s > wanted_s[num_given] + TIME_TOLERANCE_S:
            yield shown
            num_given += 1
            if num_given == len(wanted_s):
                return
        shown = (index, timed)
    for time_s in wanted_s[num_given:]:
        if shown is None or time_s >= shown[1].end_s - TIME_TOLERANCE_S:
            return
        yield shown


def shown_until(path: Path, enough_s: float) -> float:
    """When the last frame stops being shown, or any time after `enough_s`; cheap.

    One frame is decoded, to see that it can be; for the rest, packets are read, not decoded.
    """
    end_s = 0.0
    # The second round reads the whole file: some containers seek past what is asked for.
    for start_s in (enough_s, 0.0):
        with _open_video(path) as (container, stream):
            if next(container.decode(stream), None) is None:
                raise ClipError(f"{path}: cannot be read (no frame could be decoded)")
            if start_s > 0:
                _seek(container, stream, start_s)
            for packet in container.demux(stream):
                timestamp = packet.dts if packet.pts is None else packet.pts
                if timestamp is not None:
                    end_s = max(end_s, sum(_interval_s(stream, timestamp, packet.duration)))
                if enough_s < end_s - TIME_TOLERANCE_S:
                    return end_s
    return end_s


def upright(timed: TimedFrame, reformatter: VideoReformatter) -> tuple[Tensor, float]:
    """RGB pixels `(H, W, C)` with the display rotation applied, and their pixel aspect.

    Args:
        reformatter: one for all frames of a video: setting it up costs as much as using it.
    """
    num_turns = round(timed.frame.rotation / 90)
    pixels_HWC = np.rot90(reformatter.reformat(timed.frame, format="rgb24").to_ndarray(), num_turns)
    upright_HWC = torch.from_numpy(np.ascontiguousarray(pixels_HWC))
    return upright_HWC, 1 / timed.pixel_aspect if num_turns % 2 else timed.pixel_aspect


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ClipError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClipError(f"{path}: cannot be read ({reason})") from error


def _timed(stream: VideoStream, frame: VideoFrame) -> TimedFrame:
    if frame.pts is None:
        raise ClipError(f"{stream.container.name}: has no timestamps; remux it with ffmpeg")
    time_s, length_s = _interval_s(stream, frame.pts, frame.duration)
    return TimedFrame(frame, time_s, time_s + length_s, float(stream.sample_aspect_ratio or 1))


def _interval_s(stream: VideoStream, timestamp: int, duration: int | None) -> tuple[float, float]:
    """When a frame is first shown and for how long; the mean rate speaks where the file is mute."""
    assert stream.time_base is not None
    time_s = float((timestamp - (stream.start_time or 0)) * stream.time_base)
    if duration:
        length_s = float(duration * stream.time_base)
    else:
        length_s = float(1 / stream.average_rate) if stream.average_rate else 0.0
    return time_s, max(length_s, 2 * TIME_TOLERANCE_S)


def _seek(container: InputContainer, stream: VideoStream, time_s: float) -> None:
    assert stream.time_base is not None
    container.seek(round(time_s / stream.time_base) + (stream.start_time or 0), stream=stream)
