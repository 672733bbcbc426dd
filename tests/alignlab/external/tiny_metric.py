"""Metrics of another package, as alignlab's tests install it: right ones and wrong ones."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.metrics.plugins import Clip, ClipMetric

SEEN: list[Clip] = []


def sharpness(clip: Clip) -> float:
    """Mean difference of neighbouring pixels."""
    return float(clip.video_THWC.float().diff(dim=2).abs().mean())


def of_references(clip: Clip) -> float | None:
    """Mean grey level of the references; None without any."""
    if not clip.references:
        return None
    return float(torch.stack([one.image_HWC for one in clip.references]).float().mean())


def colours(clip: Clip) -> tuple[Tensor, Tensor]:
    """Mean colours of the clip and of the real one."""
    return clip.video_THWC.float().mean((0, 1, 2)), clip.real_THWC.float().mean((0, 1, 2))


def gap(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Distance of the mean colours of all clips, a tensor without dimensions."""
    shown, real = (torch.stack(part).mean(0) for part in zip(*pairs, strict=True))
    distance: Tensor = torch.linalg.vector_norm(shown - real)
    return distance


def spoils(clip: Clip) -> float:
    """Writes into all that it gets, and draws random numbers of all kinds."""
    SEEN.append(clip)
    value = float(torch.rand(()))
    for tensor in (clip.video_THWC, clip.real_THWC, *(one.image_HWC for one in clip.references)):
        tensor.zero_()
    torch.manual_seed(random.randrange(1000))
    return value


def fails_on(clip: Clip) -> float:
    raise ValueError("no face\nin it")


def fails_on_generated(clip: Clip) -> float:
    if not torch.equal(clip.video_THWC, clip.real_THWC):
        raise ValueError("this is no real clip")
    return 0.0


def needs_weights() -> str:
    return "weights.pt is not in\n~/faces"


def no_clip() -> float:
    return 0.0


SHARP = ClipMetric("sharpness", sharpness, better="higher", headline=True, unit="grey levels")
GAP = ClipMetric("distance of mean colours", colours, reduce=gap, better="lower")
GREY = ClipMetric("grey level of references", of_references)
SPOILS = ClipMetric("spoils", spoils)
SMALL = ClipMetric("numpy", lambda clip: np.float32(0.5))
NONE = ClipMetric("nothing", lambda clip: None)
FEW = ClipMetric("too few", lambda clip: 1, reduce=lambda values: None)

NAN = ClipMetric("nan", lambda clip: float("nan"))
VECTOR = ClipMetric("vector", lambda clip: clip.video_THWC.float().mean((0, 1, 2)))
TEXT = ClipMetric("text", lambda clip: "good")
RAISES = ClipMetric("raises", fails_on)
LATE = ClipMetric("late", fails_on_generated)
ENDS = ClipMetric("ends", lambda clip: exit(3))
BAD_REDUCE = ClipMetric("reduce", colours, reduce=lambda pairs: [1.0, 2.0])
NEEDY = ClipMetric("needy", sharpness, missing=needs_weights)

no_label: Any = ClipMetric("", sharpness)
two_lines: Any = ClipMetric("a\nb", sharpness)
no_side: Any = ClipMetric("side", sharpness, better="up")  # type: ignore[arg-type]
no_headline: Any = ClipMetric("headline", sharpness, headline=1)  # type: ignore[arg-type]
no_function: Any = ClipMetric("function", 3)  # type: ignore[arg-type]
no_argument: Any = ClipMetric("argument", no_clip)  # type: ignore[arg-type]
no_reduce: Any = ClipMetric("reduce", sharpness, reduce=no_clip)  # type: ignore[arg-type]
