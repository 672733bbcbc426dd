"""`shapes`: generated clips of two or three textured subjects that move as the caption says.

Everything an objective or a metric could ask for is exact: which reference shows which subject,
visible masks per frame, forward optical flow, entity phrases. A clip is a pure function of
`(seed, split, index)`. Array letters: T frames, H height, W width, E entities.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alignlab.config.data import MAX_SUBJECTS, ShapesConfig
from alignlab.data.sample import Reference, Sample
from alignlab.data.shapes.world import (
    ACCENTS,
    BACKDROPS,
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    Array,
    Subject,
    draw_background,
    draw_subject,
)
from alignlab.dataset_cache.clip_keys import ClipOrigin
from alignlab.dataset_cache.key import Part

WORLD_VERSION = 1
"""Of all that a clip is drawn by. Raise it when the same settings give other pixels: what the
dataset cache holds of the older ones is then not read any more."""
REFERENCE_RADIUS = 0.40  # of the shorter image side
SPLIT_STREAMS = {"train": 0, "val": 1}


@dataclass(frozen=True)
class Track:
    """A subject's rigid motion: centre in pixels, rotation in radians, one value per frame."""

    subject: Subject
    motion: str
    radius: float
    x_T: Array
    y_T: Array
    angle_T: Array


@dataclass(frozen=True)
class _Scene:
    """What a clip shows; `rng` goes on to the background's phase and the references."""

    tracks: list[Track]
    num_references: int
    tone: str
    backdrop: str
    rng: np.random.Generator

    def background_phase(self) -> float:
        """The next draw of `rng`."""
        return float(self.rng.uniform(0, 6.28))

    @property
    def pictured(self) -> list[Track]:
        """Those that have a reference."""
        return self.tracks[: self.num_references]

    @property
    def caption(self) -> str:
        spoken = ", ".join(
            f"{_with_article(t.subject.phrase)} moves {t.motion}" for t in self.tracks
        )
        return f"{spoken}, over a {self.backdrop} {self.tone} background"

    @property
    def entities(self) -> tuple[str, ...]:
        return tuple(t.subject.phrase for t in self.tracks)


class ShapesDataset:
    """Clips of the shapes world (see `alignlab.config.data.ShapesConfig` for the settings).

    Args:
        config: frames, size, reference counts and clip counts.
        split: `train` and `val` draw from different random streams.
    """

    notes = ()

    def __init__(self, config: ShapesConfig, split: Literal["train", "val"]) -> None:
        self.config = config
        self.split = split

    def __len__(self) -> int:
        return self.config.train_clips if self.split == "train" else self.config.val_clips

    def __getitem__(self, index: int) -> Sample:
        scene = self._draw(index)
        height, width = self.config.size
        background = draw_background(
            scene.backdrop, scene.tone, height, width, scene.background_phase()
        )
        video, masks, flow = render(scene.tracks, background)
        return Sample(
            key=self.key(index),
            video_THWC=torch.from_numpy(video),
            caption=scene.caption,
            references=self._pictures(scene),
            entities=scene.entities,
            masks_ETHW=torch.from_numpy(masks),
            flow_THWC=torch.from_numpy(flow),
        )

    def caption(self, index: int) -> str:
        """The caption of a clip; nothing is rendered."""
        return self._draw(index).caption

    def entities(self, index: int) -> tuple[str, ...]:
        """What the subjects of a clip are called; nothing is rendered."""
        return self._draw(index).entities

    def key(self, index: int) -> str:
        """The key of a clip."""
        return f"shapes-{self.config.seed}-{self.split}-{index:06d}"

    def references(self, index: int) -> tuple[Reference, ...]:
        """The references of a clip; its video is not rendered."""
        scene = self._draw(index)
        scene.background_phase()  # drawn before them
        return self._pictures(scene)

    def names(self, index: int) -> tuple[str, ...]:
        """The names of the references of a clip; nothing is rendered."""
        return tuple(track.subject.name for track in self._draw(index).pictured)

    def origin(self, index: int) -> ClipOrigin:
        """The settings that a clip is drawn from, and the code that draws it."""
        config = self.config
        parts: dict[str, Part] = {
            "data": "shapes",
            "world": WORLD_VERSION,
            "numpy": np.__version__,
            "seed": config.seed,
            "split": self.split,
            "index": index,
            "frames": config.frames,
            "size": tuple(config.size),
            "references": tuple(config.references),
        }
        return ClipOrigin(parts, parts)

    def _pictures(self, scene: "_Scene") -> tuple[Reference, ...]:
        height, width = self.config.size
        tracks = scene.pictured
        return tuple(draw_reference(t.subject, scene.rng, height, width) for t in tracks)

    def _draw(self, index: int) -> "_Scene":
        if not 0 <= index < len(self):
            raise IndexError(f"shapes has {len(self)} {self.split} clips, no clip {index}")
        rng, count = self._begin(index)
        height, width = self.config.size
        tracks = _draw_tracks(rng, max(count, 1), self.config.frames, height, width)
        tone, backdrop = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(BACKDROPS))
        return _Scene(tracks, count, tone, backdrop, rng)

    def without_masks(self) -> None:
        """Every clip has entity masks."""

    def share_with_references(self) -> float:
        """Share of the clips, of the first thousand, that draw a reference."""
        if self.config.references[0] > 0:
            return 1.0
        count = min(len(self), 1000)
        return sum(self._begin(index)[1] > 0 for index in range(count)) / count

    def _begin(self, index: int) -> tuple[np.random.Generator, int]:
        """The generator of a clip, and what it draws first: how many references there are."""
        rng = np.random.default_rng([self.config.seed, SPLIT_STREAMS[self.split], index])
        low, high = self.config.references
        return rng, int(rng.integers(low, high + 1))


def draw_reference(
    subject: Subject, rng: np.random.Generator, height: int, width: int
) -> Reference:
    """The subject alone on white, in a pose of its own (a cross pair: not cut from the clip)."""
    radius = REFERENCE_RADIUS * min(height, width) * rng.uniform(0.85, 1.1)
    x, y = _own_coordinates(
        _one(width / 2 + rng.uniform(-0.05, 0.05) * width),
        _one(height / 2 + rng.uniform(-0.05, 0.05) * height),
        _one(rng.uniform(-math.pi, math.pi)),
        radius,
        height,
        width,
    )
    rgb, coverage = draw_subject(subject, x[0], y[0], radius)
    image = 255 + (rgb - 255) * coverage[..., None]
    return Reference(
        image_HWC=torch.from_numpy(_to_uint8(image)),
        mask_HW=torch.from_numpy(coverage > 0.5),
        name=subject.name,
        phrase=subject.phrase,
    )


def render(
    tracks: list[Track], background: Array
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], Array]:
    """Draws the tracks back to front.

    Returns:
        uint8 video `(T, H, W, 3)`, bool visible masks `(E, T, H, W)`, and float32 forward flow
        `(T-1, H, W, 2)` in pixels per frame (x then y), zero on the background.
    """
    height, width = background.shape[:2]
    frames = len(tracks[0].x_T)
    video = np.repeat(background[None], frames, axis=0)
    owner = np.full((frames, height, width), -1)
    for number, track in enumerate(tracks):
        x, y = _own_coordinates(track.x_T, track.y_T, track.angle_T, track.radius, height, width)
        rgb, coverage = draw_subject(track.subject, x, y, track.radius)
        video += (rgb - video) * coverage[..., None]
        owner[coverage > 0.5] = number
    masks = np.stack([owner == number for number in range(len(tracks))])
    return _to_uint8(video), masks, _flow(tracks, masks)


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _flow(tracks: list[Track], masks_ETHW: NDArray[np.bool_]) -> Array:
    _, frames, height, width = masks_ETHW.shape
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    flow = np.zeros((frames - 1, height, width, 2), np.float32)
    for track, mask_THW in zip(tracks, masks_ETHW, strict=True):
        for t in range(frames - 1):
            turn = float(track.angle_T[t + 1] - track.angle_T[t])
            dx, dy = xx - track.x_T[t], yy - track.y_T[t]
            to_x = track.x_T[t + 1] + dx * math.cos(turn) - dy * math.sin(turn)
            to_y = track.y_T[t + 1] + dx * math.sin(turn) + dy * math.cos(turn)
            moved = np.stack([to_x - xx, to_y - yy], axis=-1)
            flow[t][mask_THW[t]] = moved[mask_THW[t]]
    return flow


def _draw_tracks(
    rng: np.random.Generator, count: int, frames: int, height: int, width: int
) -> list[Track]:
    side = min(height, width)
    colors = rng.permutation(list(COLORS))[:count]  # distinct, so that phrases are distinct
    # distinct, so that subjects rarely start overlapped
    quarters = rng.permutation(MAX_SUBJECTS)[:count]
    along = np.linspace(-0.5, 0.5, frames).astype(np.float32)
    tracks = []
    for color, quarter in zip(colors, quarters, strict=True):
        subject = Subject(
            str(rng.choice(SHAPES)),
            str(color),
            str(rng.choice(TEXTURES)),
            str(rng.choice(list(ACCENTS))),
        )
        motion = str(rng.choice(list(MOTIONS)))
        travel = rng.uniform(0.25, 0.4)  # of the side that it crosses, over the whole clip
        direction = MOTIONS[motion]
        cx = (0.3 + 0.4 * (quarter % 2) + rng.uniform(-0.05, 0.05)) * width
        cy = (0.3 + 0.4 * (quarter // 2) + rng.uniform(-0.05, 0.05)) * height
        turn = rng.uniform(-0.6, 0.6)
        tracks.append(
            Track(
                subject,
                motion,
                radius=float(rng.uniform(0.2, 0.25)) * side,
                x_T=(cx + direction[0] * travel * width * along).astype(np.float32),
                y_T=(cy + direction[1] * travel * height * along).astype(np.float32),
                angle_T=(rng.uniform(-math.pi, math.pi) + turn * along).astype(np.float32),
            )
        )
    return tracks


def _own_coordinates(
    x_T: Array, y_T: Array, angle_T: Array, radius: float, height: int, width: int
) -> tuple[Array, Array]:
    """Pixel grid seen from the subject: `(T, H, W)` each, in radii."""
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    dx, dy = xx - x_T[:, None, None], yy - y_T[:, None, None]
    cos, sin = np.cos(angle_T)[:, None, None], np.sin(angle_T)[:, None, None]
    return (dx * cos + dy * sin) / radius, (-dx * sin + dy * cos) / radius


def _one(value: float) -> Array:
    return np.asarray([value], np.float32)


def _to_uint8(image: Array) -> NDArray[np.uint8]:
    return np.asarray(np.clip(np.rint(image), 0, 255), np.uint8)
