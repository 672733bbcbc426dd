"""The world of `shapes`: what can be named, and how one subject is drawn.

A subject is a shape with a colour, a texture and an accent colour. The caption names the first
three; the accent (the second colour of the texture, or the outline of a plain subject) can only
be learnt from the reference image. Array letters: T frames, H height, W width.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # of floats; numpy's own types do not tell float32 arithmetic apart

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 210, 50),
    "green": (50, 160, 70),
    "cyan": (60, 195, 215),
    "blue": (40, 85, 205),
    "purple": (125, 55, 165),
    "pink": (240, 130, 175),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
ACCENTS = {
    "black": (25, 25, 25),
    "white": (245, 245, 245),
    "gray": (135, 135, 135),
    "navy": (25, 30, 95),
}
MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
BACKGROUNDS = {
    "gray": (120, 122, 126),
    "beige": (205, 190, 160),
    "brown": (120, 88, 62),
    "olive": (112, 118, 70),
}
BACKDROPS = ("plain", "sloped", "wavy", "tiled")


@dataclass(frozen=True)
class Subject:
    """One identity. Two renderings of an equal `Subject` show the same thing."""

    shape: str
    color: str
    texture: str
    accent: str

    @property
    def name(self) -> str:
        """Identity label: all four attributes."""
        return f"{self.color}-{self.texture}-{self.shape}-{self.accent}"

    @property
    def phrase(self) -> str:
        """What a caption says; the accent stays unsaid."""
        return f"{self.color} {self.texture} {self.shape}"


def all_subjects() -> list[Subject]:
    """Every identity of the world, in a fixed order (768 of them)."""
    return [
        Subject(shape, color, texture, accent)
        for shape in SHAPES
        for color in COLORS
        for texture in TEXTURES
        for accent in ACCENTS
    ]


def signed_distance(shape: str, x: Array, y: Array) -> Array:
    """Distance to the outline in units of the subject's radius, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9
    if shape == "square":
        return np.asarray(np.maximum(abs(x), abs(y)) - 0.8)
    if shape == "triangle":
        return np.maximum(abs(x) * 0.866 + y * 0.5, -y) - 0.5
    if shape == "cross":
        arm = np.maximum(abs(x) - 0.95, abs(y) - 0.33)
        return np.asarray(np.minimum(arm, np.maximum(abs(y) - 0.95, abs(x) - 0.33)))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.66) - 0.29
    if shape == "star":
        angle = np.arctan2(x, -y)
        sector = (angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
        radius = np.hypot(x, y)
        # One point's edge runs from its tip (radius 1) to the notch (radius 0.45, 36 degrees).
        px, py = radius * np.cos(sector), abs(radius * np.sin(sector))
        nx, ny = 0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5)
        edge = math.hypot(nx - 1.0, ny)
        return np.asarray((ny * (px - 1.0) - (nx - 1.0) * py) / edge)
    raise ValueError(f"no shape named {shape!r}")


def accent_weight(texture: str, distance: Array, x: Array, y: Array, blur: float) -> Array:
    """Share of the accent colour at each point, 0..1, antialiased over `blur` radii."""
    if texture == "plain":
        field = distance + 0.18  # an outline 0.18 radii wide
    elif texture == "striped":
        field = np.sin(x * 2 * math.pi / 0.85) * 0.14
    elif texture == "dotted":
        field = 0.23 - np.hypot((x + 0.36) % 0.72 - 0.36, (y + 0.36) % 0.72 - 0.36)
    elif texture == "checkered":
        field = np.sin(x * math.pi / 0.55) * np.sin(y * math.pi / 0.55) * 0.18
    else:
        raise ValueError(f"no texture named {texture!r}")
    return np.asarray(np.clip(field / blur + 0.5, 0.0, 1.0), np.float32)


def draw_subject(subject: Subject, x: Array, y: Array, radius_px: float) -> tuple[Array, Array]:
    """Colours and coverage of a subject at points given in its own coordinates.

    Args:
        x: horizontal coordinate in radii, after undoing position and rotation; any shape.
        y: vertical coordinate, same shape as `x`.
        radius_px: size of one radius in pixels, which sets the antialiasing width.

    Returns:
        `(rgb, coverage)`: `(..., 3)` colours 0..255 and `(...)` opacity 0..1.
    """
    blur = 1.0 / radius_px
    distance = signed_distance(subject.shape, x, y).astype(np.float32)
    accent = accent_weight(subject.texture, distance, x, y, blur)[..., None]
    base = np.asarray(COLORS[subject.color], np.float32)
    rgb = base + accent * (np.asarray(ACCENTS[subject.accent], np.float32) - base)
    coverage = np.clip(0.5 - distance / blur, 0.0, 1.0)
    return rgb, coverage.astype(np.float32)


def draw_background(backdrop: str, tone: str, height: int, width: int, phase: float) -> Array:
    """A static backdrop `(H, W, 3)`, 0..255."""
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = xx / width, yy / height
    if backdrop == "plain":
        shade = np.zeros_like(x)
    elif backdrop == "sloped":
        shade = 60 * (x * math.cos(phase) + y * math.sin(phase)) - 25
    elif backdrop == "wavy":
        shade = 16 * np.sin(2 * math.pi * (2 * y + 0.25 * np.sin(2 * math.pi * x + phase)) + phase)
    elif backdrop == "tiled":
        shade = np.where((np.floor(x * 4) + np.floor(y * 4)) % 2 == 0, 14.0, -14.0)
    else:
        raise ValueError(f"no backdrop named {backdrop!r}")
    rgb = np.asarray(BACKGROUNDS[tone], np.float32) + shade[..., None]
    return np.asarray(np.clip(rgb, 0, 255), np.float32)
