"""Frames of a video file at wanted times, through PyAV.

Times are seconds after the file's first frame. `alignlab.data.video` is the public side.
Shape letters: H height, W width, C channels (RGB).
"""

import heapq
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
import PIL
import torch
from av.container import InputContainer
from av.format import Flags
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from alignlab.errors import UserError

# Matroska rounds timestamps to a millisecond, so a frame that is half of one late is on time.
TIME_TOLERANCE_S = 0.6e-3
# A frame is shown at most 16 frames after it is decoded (H.264, HEVC): a stream that reorders
# frames at all does so within twice as many packets.
REORDER_PACKETS = 33
# A transport stream's clock may be set anew where recordings meet; FFmpeg takes a step of more
# than ten seconds (dts_delta_threshold) for that.
CLOCK_STEP_S = 10.0
# A matrix in 16.16 fixed point is a right angle's up to this share of its largest element.
MATRIX_TOLERANCE = 0.01
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # H.273 code points
NOT_FILMED = Disposition.attached_pic | Disposition.timed_thumbnails


class ClipError(UserError):
    """A video or image file that cannot be used; the message names the file and the reason.

    Args:
        message: one line.
        kind: a word or two by which such errors are counted.
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


def media_libraries() -> str:
    """What decodes videos and images, with versions."""
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"av {av.__version__}, libavcodec {libavcodec}, Pillow {PIL.__version__}"


class Orientation(NamedTuple):
    """How stored pixels are shown: transposed or not, then rows, then columns reversed."""

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame, and when and how it is shown.

    Args:
        frame: as stored.
        time_s: when it is first shown.
        end_s: until when.
        pixel_aspect: width of a stored pixel divided by its height.
        orientation: of the stored pixels.
        is_damaged: the decoder hid damage in this frame, or in one that it may be predicted from.
    """

    frame: VideoFrame
    time_s: float
    end_s: float
    pixel_aspect: float
    orientation: Orientation
    is_damaged: bool


def decoded_frames(path: Path, start_s: float = 0.0, *, threads: int = 0) -> Iterator[TimedFrame]:
    """Frames in display order from a keyframe at or before `start_s`.

    Args:
        threads: of the decoder, which change no pixel; 0: as many as FFmpeg finds good.

    Raises:
        ClipError: an unreadable file, one without a video stream or without timestamps, or whose
            timestamps fall.
    """
    with _open_video(path, threads) as (container, stream):
        by_order = _times_are_of_decode_order(container, stream)
    if start_s > 0 and not by_order:
        with _open_video(path, threads) as (container, stream):
            timed_frames = _frames_from_keyframe(container, stream, start_s)
            first = next(timed_frames, None)
            if first is not None and first.time_s <= start_s + TIME_TOLERANCE_S:
                yield first
                yield from timed_frames
                return
    # From the file's beginning, also when a container without an index has landed too late.
    with _open_video(path, threads) as (container, stream):
        frames = _decoded(_packets(container, stream), by_order=by_order)
        yield from _timed(stream, frames)


def frames_at(
    path: Path, wanted_s: list[float], *, seek: bool, threads: int = 0
) -> Iterator[tuple[int, TimedFrame]]:
    """The frame shown at each wanted time, with its position among the decoded ones.

    Args:
        wanted_s: increasing times. Frames end early when the file does.
        seek: start at a keyframe shortly before the first wanted time; positions then count
            from that keyframe instead of from the file's first frame.
        threads: as in `decoded_frames`.

    Raises:
        ClipError: as `decoded_frames`, or a wanted frame is damaged.
    """
    shown: tuple[int, TimedFrame] | None = None
    num_given = 0
    start_s = wanted_s[0] if seek else 0.0
    for index, timed in enumerate(decoded_frames(path, start_s, threads=threads)):
        while shown is not None and timed.time_s > wanted_s[num_given] + TIME_TOLERANCE_S:
            yield _undamaged(path, shown)
            num_given += 1
            if num_given == len(wanted_s):
                return
        shown = (index, timed)
    for time_s in wanted_s[num_given:]:
        if shown is None or time_s >= shown[1].end_s - TIME_TOLERANCE_S:
            return
        yield _undamaged(path, shown)


def _undamaged(path: Path, shown: tuple[int, TimedFrame]) -> tuple[int, TimedFrame]:
    if shown[1].is_damaged:
        raise ClipError(f"{path}: is damaged at {shown[1].time_s:.2f} s", kind="damaged")
    return shown


def upright(timed: TimedFrame, reformatter: VideoReformatter) -> tuple[Tensor, float]:
    """RGB pixels `(H, W, C)` turned and mirrored as the file says, and their pixel aspect.

    Args:
        reformatter: one for all frames of a video: setting it up costs as much as using it.
    """
    pixels_HWC = reformatter.reformat(timed.frame, format="rgb24").to_ndarray()
    turn = timed.orientation
    if turn.is_transposed:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    pixels_HWC = pixels_HWC[:: -1 if turn.flips_rows else 1, :: -1 if turn.flips_columns else 1]
    upright_HWC = torch.from_numpy(np.ascontiguousarray(pixels_HWC))
    return upright_HWC, 1 / timed.pixel_aspect if turn.is_transposed else timed.pixel_aspect


def upright_size(timed: TimedFrame) -> tuple[int, int]:
    """Height and width of what `upright` gives."""
    height, width = timed.frame.height, timed.frame.width
    return (width, height) if timed.orientation.is_transposed else (height, width)


def _orientation(name: str, frame: VideoFrame) -> Orientation:
    """What the frame's display matrix says.

    The matrix (a b u, c d v, x y w) shows the stored pixel (p, q), p to the right and q down, at
    (a p + c q, b p + d q).

    Raises:
        ClipError: a rotation by no multiple of 90 degrees, or a shear.
    """
    try:
        # the stubs of PyAV know its keys as texts only
        side_data = cast(Any, frame.side_data)[SideDataType.DISPLAYMATRIX]
    except KeyError:
        return Orientation()
    matrix = np.frombuffer(bytes(side_data), dtype=np.int32).astype(float)
    a, b, c, d = matrix[[0, 1, 3, 4]]
    nothing = MATRIX_TOLERANCE * max(abs(a), abs(b), abs(c), abs(d))
    if max(abs(b), abs(c)) <= nothing < min(abs(a), abs(d)):
        return Orientation(False, bool(d < 0), bool(a < 0))
    if max(abs(a), abs(d)) <= nothing < min(abs(b), abs(c)):
        return Orientation(True, bool(b < 0), bool(c < 0))
    raise ClipError(
        f"{name}: is to be shown turned by {abs(frame.rotation):g} degrees, no multiple of 90; "
        "turn its pixels (ffmpeg does) and encode it anew",
        kind="turned",
    )


def hdr_transfer(frame: VideoFrame) -> str | None:
    """PQ or HLG, if the frame's colours are so coded: read as they are, they are pale."""
    return HDR_TRANSFERS.get(int(frame.color_trc))


@contextmanager
def _open_video(path: Path, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(str(path)) as container:
            stream = _filmed_stream(path, container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream
    except (av.FFmpegError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClipError(f"{path}: cannot be read ({reason})") from error


def _filmed_stream(path: Path, container: InputContainer) -> VideoStream:
    """The default video stream, of several the one with the largest picture; no cover image."""
    streams = [s for s in container.streams.video if not s.disposition & NOT_FILMED]
    if not streams:
        cover = " (only a cover image)" if container.streams.video else ""
        raise ClipError(f"{path}: has no video stream{cover}")
    return max(
        streams,
        key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height, -s.index),
    )


def _may_set_its_clock(container: InputContainer) -> bool:
    """Whether this kind of container may be cut and joined anywhere: MPEG streams, Ogg."""
    return bool(Flags(container.format.flags) & Flags.ts_discont)


def _packets(container: InputContainer, stream: VideoStream) -> "Iterator[Packet[VideoStream]]":
    """All packets in decode order; where the clock is set anew, times go on from what was."""
    is_steady = not _may_set_its_clock(container)
    shift = 0
    last: int | None = None
    expected = 0
    for packet in container.demux(stream):
        if is_steady or packet.dts is None:
            yield packet
            continue
        assert stream.time_base is not None
        dts = packet.dts + shift
        step = CLOCK_STEP_S / stream.time_base
        if last is not None and not last <= dts <= expected + step:
            shift += expected - dts
            dts = expected
        if packet.pts is not None:
            packet.pts += shift
        packet.dts = last = dts
        expected = dts + (packet.duration or 0)
        yield packet


def _decoded(
    packets: "Iterable[Packet[VideoStream]]", *, by_order: bool = False
) -> Iterator[tuple[VideoFrame, int | None]]:
    """Frames in display order with their timestamps: their own, or the packets' in order."""
    unshown: list[int] = []
    for packet in packets:
        stamp = _stamp(packet)
        if by_order and stamp is not None:
            heapq.heappush(unshown, stamp)
        for frame in packet.decode():
            assert isinstance(frame, VideoFrame)
            yield frame, heapq.heappop(unshown) if unshown else frame.pts


def _stamp(packet: "Packet[VideoStream]") -> int | None:
    return packet.dts if packet.pts is None else packet.pts


def _times_are_of_decode_order(container: InputContainer, stream: VideoStream) -> bool:
    """Whether timestamps follow the order of decoding although frames are shown in another one.

    AVI stores no other, and files that were copied out of one have none either. Of such files the
    k-th frame that is shown has the k-th timestamp.
    """
    if not stream.codec_context.has_b_frames:
        return False
    packets = list(islice(_packets(container, stream), REORDER_PACKETS))
    stamps = [stamp for packet in packets if (stamp := _stamp(packet)) is not None]
    if any(later <= earlier for earlier, later in pairwise(stamps)):
        return False
    last: int | None = None
    with suppress(av.FFmpegError):  # damage, which may lie behind what is wanted
        for frame, _ in _decoded(packets):
            if frame.pts is None or (last is not None and frame.pts <= last):
                return True
            last = frame.pts
    return False


def _frames_from_keyframe(
    container: InputContainer, stream: VideoStream, start_s: float
) -> Iterator[TimedFrame]:
    """Frames from a keyframe near `start_s`; a container without an index may land too late."""
    assert stream.time_base is not None
    first = next(_timed(stream, _decoded(_packets(container, stream))), None)
    if first is None or first.frame.pts is None:
        return
    start = first.frame.pts + round(start_s / stream.time_base)
    if not _may_set_its_clock(container):
        container.seek(start, stream=stream)
        yield from _timed(stream, _decoded(container.demux(stream)), first.frame.pts)
        return
    # times name no place in such a file: its packets are counted, which is fast, not decoded
    path, keyframe = Path(container.name), 0
    with _open_video(path, 1) as (counted, counted_stream):
        for number, packet in enumerate(_packets(counted, counted_stream)):
            if packet.dts is not None and packet.dts > start:
                break
            if packet.is_keyframe and packet.pts is not None and packet.pts <= start:
                keyframe = number
    threads = stream.codec_context.thread_count
    with _open_video(path, threads) as (opened, opened_stream):
        packets = islice(_packets(opened, opened_stream), keyframe, None)
        yield from _timed(opened_stream, _decoded(packets), first.frame.pts)


def _timed(
    stream: VideoStream, frames: Iterable[tuple[VideoFrame, int | None]], origin: int | None = None
) -> Iterator[TimedFrame]:
    """Frames with their times.

    Args:
        origin: timestamp of the file's first frame; None: these begin with it.

    Raises:
        ClipError: a frame without a timestamp, or one that falls; a rotation by no right angle.
    """
    name, is_damaged = stream.container.name, False
    last: int | None = None
    for frame, stamp in frames:
        if stamp is None:
            raise ClipError(f"{name}: has no timestamps; remux it with ffmpeg")
        origin = stamp if origin is None else origin
        time_s, length_s = _interval_s(stream, stamp - origin, frame.duration)
        if last is not None and stamp < last:
            raise ClipError(f"{name}: has timestamps that fall at {time_s:.2f} s; encode it anew")
        last = stamp
        # what is wrong in a frame spreads to those that are predicted from it
        is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)
        aspect = float(stream.sample_aspect_ratio or 1)
        turn = _orientation(name, frame)
        yield TimedFrame(frame, time_s, time_s + length_s, aspect, turn, is_damaged)


def _interval_s(stream: VideoStream, since: int, duration: int | None) -> tuple[float, float]:
    """When a frame is first shown and for how long; the mean rate speaks where the file is mute.

    Args:
        since: timestamps after the file's first frame.
    """
    assert stream.time_base is not None
    if duration:
        length_s = float(duration * stream.time_base)
    else:
        length_s = float(1 / stream.average_rate) if stream.average_rate else 0.0
    return float(since * stream.time_base), max(length_s, 2 * TIME_TOLERANCE_S)
