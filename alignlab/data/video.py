"""Clips in and out of video files, through PyAV.

Shape letters: T frames, H height, W width, C channels (RGB).
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from torch import Tensor

from alignlab.data.decode import (
    ClipError,
    TimedFrame,
    frames_at,
    hdr_transfer,
    upright,
    upright_size,
)
from alignlab.data.resize import cover_crop
from alignlab.runs.atomic_files import whole_file

# H.273 code points: BT.709 has the same one as matrix, primaries and transfer function.
BT709 = 1
LIMITED_RANGE = 1


@dataclass(frozen=True)
class DecodedClip:
    """A clip together with where its frames came from.

    Args:
        video_THWC: uint8 RGB.
        frame_indices: position in the file, counted in display order, of each frame.
        source_size_HW: upright size of the file's frames, in stored pixels.
        pixel_aspect: width of a stored pixel divided by its height, upright.
    """

    video_THWC: Tensor
    frame_indices: tuple[int, ...]
    source_size_HW: tuple[int, int]
    pixel_aspect: float


def decode_clip(
    path: Path,
    *,
    frames: int,
    fps: float,
    size_HW: tuple[int, int],
    start_s: float = 0.0,
    seek: bool = False,
) -> DecodedClip:
    """Decode `frames` frames at `fps`, resized to cover `size_HW` and cropped at the centre.

    Frame k is the last one that starts at or before `start_s + k / fps` (give or take
    0.6 ms, since containers round), by timestamps, so any source rate, constant or not, keeps
    its speed. The resize is antialiased bicubic; display rotation, mirroring and non-square pixels
    are honoured.

    Args:
        path: any file FFmpeg reads.
        frames: number of frames, T.
        fps: frames per second of the result.
        size_HW: height and width of the result.
        start_s: seconds after the first frame of the file.
        seek: jump to a keyframe near the start, which is faster; frame indices then count from
            that keyframe.

    Raises:
        ClipError: unreadable or damaged file, no video stream, or fewer frames than asked for.
    """
    video: list[Tensor] = []
    indices: list[int] = []
    source_size_HW, pixel_aspect = (0, 0), 1.0
    reformatter = VideoReformatter()
    for index, timed in _clip_frames(path, frames, fps, start_s, seek=seek):
        if indices and indices[-1] == index:
            video.append(video[-1])
        else:
            upright_HWC, pixel_aspect = upright(timed, reformatter)
            source_size_HW = (upright_HWC.shape[0], upright_HWC.shape[1])
            cropped_CHW = cover_crop(
                upright_HWC.permute(2, 0, 1), size_HW, pixel_aspect=pixel_aspect
            )
            video.append(cropped_CHW.permute(1, 2, 0))
        indices.append(index)
    return DecodedClip(torch.stack(video), tuple(indices), source_size_HW, pixel_aspect)


@dataclass(frozen=True)
class ClipFacts:
    """What `check_clip` saw of a clip.

    Args:
        frame_indices: as in `DecodedClip`.
        source_size_HW: as in `DecodedClip`.
        hdr: PQ or HLG, if the colours are so coded; they are read as they are, hence pale.
    """

    frame_indices: tuple[int, ...]
    source_size_HW: tuple[int, int]
    hdr: str | None


def check_clip(
    path: Path, *, frames: int, fps: float, start_s: float = 0.0, seek: bool = False
) -> ClipFacts:
    """Decode a clip as `decode_clip` does, in one thread, but make pixels of one frame alone.

    Raises:
        ClipError: as `decode_clip`.
    """
    indices: list[int] = []
    size_HW, hdr = (0, 0), None
    for index, timed in _clip_frames(path, frames, fps, start_s, seek=seek, threads=1):
        if not indices:
            upright(timed, VideoReformatter())
            hdr = hdr_transfer(timed.frame)
        size_HW = upright_size(timed)
        indices.append(index)
    return ClipFacts(tuple(indices), size_HW, hdr)


def _clip_frames(
    path: Path, frames: int, fps: float, start_s: float, *, seek: bool, threads: int = 0
) -> Iterator[tuple[int, TimedFrame]]:
    if frames < 1 or fps <= 0 or start_s < 0:
        raise ValueError(f"impossible clip: frames={frames}, fps={fps}, start_s={start_s}")
    num_given = 0
    wanted_s = [start_s + k / fps for k in range(frames)]
    for indexed in frames_at(path, wanted_s, seek=seek, threads=threads):
        yield indexed
        num_given += 1
    if num_given < frames:
        since = f" from {start_s:g} s on" if start_s else ""
        raise ClipError(
            f"{path}: is too short: {num_given} frames at {fps:g} fps{since}, {frames} are needed "
            "(data.frames)",
            kind="too short",
        )


def encode_mp4(video_THWC: Tensor, fps: float, *, crf: int = 18) -> bytes:
    """Encode a clip as H.264, yuv420p, BT.709, playable by browsers.

    Args:
        video_THWC: uint8 RGB; height and width must be even (4:2:0 chroma).
        fps: frames per second.
        crf: x264 quality, 0 (lossless) to 51; 18 is visually transparent.
    """
    if video_THWC.dtype != torch.uint8 or video_THWC.ndim != 4 or video_THWC.shape[3] != 3:
        raise ValueError(f"expected uint8 (T, H, W, 3), got {video_THWC.dtype} {video_THWC.shape}")
    num_frames, height, width, _ = video_THWC.shape
    if num_frames == 0 or height % 2 or width % 2:
        raise ValueError(f"H.264 yuv420p needs frames of even size, got {tuple(video_THWC.shape)}")
    buffer = io.BytesIO()
    reformatter = VideoReformatter()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        # mbtree reads memory that x264 has not written: the bytes would differ from run to run
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes then do not depend on the machine
        # Untagged video is read as BT.601 by some players and as BT.709 by others.
        stream.codec_context.colorspace = BT709
        stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        stream.codec_context.color_range = LIMITED_RANGE
        for frame_HWC in video_THWC.cpu().numpy():
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame = reformatter.reformat(frame, format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_mp4(path: Path, video_THWC: Tensor, fps: float) -> None:
    """Write a clip as `encode_mp4` makes it; the file appears whole or not at all."""
    encoded = encode_mp4(video_THWC, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_bytes(encoded)
