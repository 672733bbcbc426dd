"""Do a clip's frames hold a reference image's pixels, in the reference's own pose?

Shape letters: T frames, H height, W width, C channels (RGB), h, w of the template, y, x its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.fft import irfft2, rfft2
from torch import Tensor

Array = NDArray[Any]  # of float64, and their spectra

SIDE = 64  # pixels of the shorter side that frames are brought to
SIZES = tuple(0.3 * 1.08**i for i in range(16))  # of a pasted subject: 0.3 .. 0.95 of that side
FLAT = 1.0  # grey levels: a patch that varies less shows nothing that could be compared


def copy_paste(video_THWC: Tensor, image_HWC: Tensor, mask_HW: Tensor) -> float | None:
    """Best match of a reference's subject with any place of a frame, averaged over frames.

    The subject is cut out of its image, brought to 16 sizes (its longer side 0.3 .. 0.95 of the
    frame's shorter side, steps of 8%), and slid over the frame, not turned or mirrored. A match is
    the correlation, under the subject's mask, of colours that have each channel's mean taken off:
    1 for the same pixels whatever their brightness and contrast, around 0 for others. Frames are
    first shrunk to a shorter side of 64 pixels.

    A subject in another pose that is symmetric, or has a coarse texture, correlates as well: read
    the value against that of real clips in which the subject has another pose.

    Args:
        video_THWC: uint8 frames.
        image_HWC: uint8 reference image.
        mask_HW: bool, its subject.

    Returns:
        -1 .. 1, or None when the subject has no pixels or no structure to be recognised by.
    """
    frames = FrameSpectra.of(video_THWC)
    return best_match(frames, subject_templates(image_HWC, mask_HW, frames.size_HW))


@dataclass(frozen=True)
class FrameSpectra:
    """Frames as every subject is looked for in them.

    Args:
        size_HW: of the shrunk frames.
        colours: spectra of their channels.
        energy: spectra of their squares, summed over channels.
    """

    size_HW: tuple[int, int]
    colours: Array
    energy: Array

    @classmethod
    def of(cls, video_THWC: Tensor) -> Self:
        """Those of uint8 frames."""
        frames_TCHW = _shrunk(video_THWC)
        height, width = frames_TCHW.shape[2:]
        return cls((height, width), rfft2(frames_TCHW), rfft2((frames_TCHW**2).sum(1)))


Template = tuple[Tensor, Tensor]
"""A subject of one size, `(C, h, w)` and its mask `(h, w)`, float64."""


def subject_templates(
    image_HWC: Tensor, mask_HW: Tensor, size_HW: tuple[int, int]
) -> list[Template]:
    """A reference's subject in the sizes that it is looked for in.

    Args:
        image_HWC: uint8 reference image.
        mask_HW: bool, its subject.
        size_HW: of the shrunk frames.

    Returns:
        None of them where it has no pixels or no structure to be recognised by.
    """
    made = (_template(image_HWC, mask_HW, round(size * min(size_HW))) for size in SIZES)
    return [template for template in made if template is not None]


def best_match(frames: FrameSpectra, templates: Sequence[Template]) -> float | None:
    """`copy_paste` of a subject; None of one without templates."""
    if not templates:
        return None
    best_T = np.full(len(frames.colours), -1.0)
    for centred_Chw, mask_hw in templates:
        found = _correlation(frames, centred_Chw.numpy(), mask_hw.numpy())
        best_T = np.maximum(best_T, found.max(1))
    return float(best_T.mean())


def _shrunk(video_THWC: Tensor) -> Array:
    """Frames as float64 `(T, C, H, W)` with a shorter side of at most `SIDE`."""
    frames_TCHW = video_THWC.cpu().permute(0, 3, 1, 2)
    height, width = frames_TCHW.shape[2:]
    scale = SIDE / min(height, width)
    if scale < 1.0:
        size = (round(height * scale), round(width * scale))
        frames_TCHW = F.interpolate(frames_TCHW.float(), size, mode="bilinear", antialias=True)
    return frames_TCHW.numpy().astype(np.float64)


def _template(image_HWC: Tensor, mask_HW: Tensor, longest: int) -> Template | None:
    """The subject `(C, h, w)`, each channel's mean off and zero outside the mask `(h, w)`."""
    rows, columns = mask_HW.any(1).nonzero()[:, 0], mask_HW.any(0).nonzero()[:, 0]
    if not len(rows):
        return None
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    mask_1hw = mask_HW[box].double()[None]
    layers = torch.cat([image_HWC[box].permute(2, 0, 1).double() * mask_1hw, mask_1hw])[None]
    scale = longest / max(layers.shape[2:])
    size = tuple(max(1, round(side * scale)) for side in layers.shape[2:])
    layers = F.interpolate(layers, size, mode="bilinear", antialias=True)[0]
    mask_hw = (layers[3] > 0.5).double()
    colour_Chw = layers[:3] / layers[3].clamp_min(0.5)
    mean_C = (colour_Chw * mask_hw).sum((1, 2)) / mask_hw.sum().clamp_min(1.0)
    centred_Chw = (colour_Chw - mean_C[:, None, None]) * mask_hw
    if float(centred_Chw.square().sum()) <= FLAT**2 * float(mask_hw.sum()):
        return None
    return centred_Chw, mask_hw


def _correlation(frames: FrameSpectra, centred_Chw: Array, mask_hw: Array) -> Array:
    """Correlation at every place where the template lies inside the frame, `(T, places)`."""
    colours, energy, size_HW = frames.colours, frames.energy, frames.size_HW
    rows, columns = (size_HW[i] - mask_hw.shape[i] + 1 for i in range(2))

    def slid(product: Array) -> Array:
        # circular, but places inside the frame do not reach around its edge
        return np.asarray(irfft2(product, size_HW))[..., :rows, :columns]

    mask_spectrum = rfft2(mask_hw, size_HW).conj()
    count = mask_hw.sum()
    agreement_Tyx = slid((colours * rfft2(centred_Chw, size_HW).conj()).sum(1))
    sums_TCyx = slid(colours * mask_spectrum)
    spread_Tyx = slid(energy * mask_spectrum) - (sums_TCyx**2).sum(1) / count
    scale_Tyx = np.sqrt(np.maximum(spread_Tyx, FLAT**2 * count) * (centred_Chw**2).sum())
    shows = spread_Tyx > FLAT**2 * count
    return np.where(shows, agreement_Tyx / scale_Tyx, 0.0).reshape(len(colours), -1)
