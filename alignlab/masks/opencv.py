"""`opencv`: masks without a model, by colours and optical flow.

GrabCut (Rother et al. 2004) cuts the entities out of the first frame, DIS optical flow (Kroeger et
al. 2016) carries their masks from frame to frame, and a graph cut with the colours that were learnt
in the first frame draws their edges anew.
Array letters: H height, W width, C channels (RGB), E entities.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from alignlab.masks.segmenter import Frame, FrameMasks, Mask, Point, Prompt, Segmenter, box_of

LONGER_SIDE = (192, 512)
"""Frames are worked on with a longer side between these: GrabCut needs pixels, and takes a second
on 832x480."""
ROUNDS = 5  # of GrabCut in the first frame
STARTS = (None, 1.0, 0.6)
"""What GrabCut begins with in a box: all of it, or the ellipse of this share of its sides."""
BETTER = 0.02  # by which the fit of a later start has to be better than that of an earlier one
BAND = 0.03  # of the shorter side: how far an edge may be from where the flow puts it
SURROUNDINGS = 0.5  # of a box's side, on every side: where colours of the background are learnt
POINT_DISC = 0.03  # of the shorter side: what a point says of its surroundings
SAME = 0.8  # IoU with the first frame's mask that a cut by learnt colours needs to be used at all
NEAR = 0.6  # IoU with the mask that the flow carried that a cut needs to take its place
PART = 0.2  # of an entity's pixels that it has alone: with fewer it lies in another one
SMALLEST = 0.1  # of the area in the first frame: an entity that is smaller is in doubt
PALETTE = 256  # colours of an entity that are compared
ALIKE = 20.0  # CIELAB distance up to which two colours are the same one
RETURNS = (1.0, 0.1)
"""Pixels, and share of the speed, by which flow back and forth may miss the place of departure."""

_NO_BOX = (0, 0, 0, 0)  # where the labels say all, GrabCut reads none

Floats = NDArray[np.float32]


class OpenCV(Segmenter):
    """GrabCut, DIS optical flow, and graph cuts with the colours of the first frame.

    An entity's confidence is the least of: how well its first mask fills the box that was given;
    the lowest share of its pixels, in any frame so far, for which optical flow back and forth
    agrees; the share of its colours that it had in the first frame; and its area, where that is
    below a tenth of what it was.
    """

    @property
    def settings(self) -> dict[str, str | float | int]:
        sides = "-".join(map(str, LONGER_SIDE))
        return {"backend": "opencv", "version": 1, "opencv": cv2.__version__, "side": sides}

    def segment(self, frames: Iterable[Frame], prompts: Sequence[Prompt]) -> Iterator[FrameMasks]:
        tracker: _Tracker | None = None
        for frame_HWC in frames:
            work_HWC = _worked_on(frame_HWC)
            if tracker is None:
                tracker = _Tracker(work_HWC, _scaled(prompts, frame_HWC, work_HWC))
            else:
                tracker.advance(work_HWC)
            masks_EHW = _enlarged(tracker.shares_EHW, frame_HWC.shape[:2])
            yield FrameMasks(masks_EHW, tracker.confidence_E.copy())


class _Colours(NamedTuple):
    """GrabCut's two mixtures of Gaussians, of an entity and of what is around it."""

    around: NDArray[np.float64]
    entity: NDArray[np.float64]


class _Tracker:
    """Masks of the latest frame, as shares 0..1 of each pixel.

    Args:
        frame_HWC: the first one.
        prompts: in its pixels.
    """

    def __init__(self, frame_HWC: Frame, prompts: Sequence[Prompt]) -> None:
        masks = _exclusive([_first_mask(frame_HWC, prompt) for prompt in prompts], frame_HWC)
        self.shares_EHW = np.stack(masks).astype(np.float32)
        fits = [_fit(mask, prompt) for mask, prompt in zip(masks, prompts, strict=True)]
        self._sure_E = np.array(fits, np.float32)
        self.confidence_E = self._sure_E.copy()
        self._before = frame_HWC
        self._colours = [_learnt_colours(frame_HWC, mask) for mask in masks]
        self._palettes = [_palette(frame_HWC, mask) for mask in masks]
        self._areas = [int(mask.sum()) for mask in masks]

    def advance(self, frame_HWC: Frame) -> None:
        """Goes on to the next frame."""
        back_HW2, agrees_HW = _flow_back(self._before, frame_HWC)
        carried_EHW = np.stack([_sampled(shares_HW, back_HW2) for shares_HW in self.shares_EHW])
        masks_EHW = carried_EHW > 0.5
        cut_EHW = carried_EHW.copy()
        for number, colours in enumerate(self._colours):
            if colours is None or not masks_EHW[number].any():
                continue
            others_HW: Mask = np.asarray(np.delete(masks_EHW, number, 0).any(0))
            cut_HW = _cut(frame_HWC, carried_EHW[number], others_HW, colours)
            if iou(cut_HW, masks_EHW[number]) >= NEAR:
                cut_EHW[number] = cut_HW
        self.shares_EHW = _one_owner(cut_EHW, carried_EHW)
        for number, mask_HW in enumerate(self.shares_EHW > 0.5):
            agrees = float(agrees_HW[mask_HW].mean()) if mask_HW.any() else 0.0
            self._sure_E[number] = min(self._sure_E[number], agrees)
            alike = _likeness(self._palettes[number], _palette(frame_HWC, mask_HW))
            size = min(1.0, float(mask_HW.sum()) / max(1.0, SMALLEST * self._areas[number]))
            self.confidence_E[number] = min(self._sure_E[number], alike, size)
        self._before = frame_HWC


def iou(first: Mask, second: Mask) -> float:
    """Intersection over union; 1 where both are empty."""
    either = int((first | second).sum())
    return int((first & second).sum()) / either if either else 1.0


def _first_mask(frame_HWC: Frame, prompt: Prompt) -> Mask:
    """The entity in the first frame, by GrabCut within its box or from its points.

    In a box it is begun with all pixels of it, then with the ellipse in it; the mask whose own box
    is nearer to the one that was given is taken.
    """
    if prompt.mask_HW is not None:
        return prompt.mask_HW
    height, width = frame_HWC.shape[:2]
    if prompt.box is None:
        labels_HW = np.full((height, width), cv2.GC_PR_BGD, np.uint8)
        _mark_points(labels_HW, prompt)
        labels_HW[_like_points(frame_HWC, labels_HW)] = cv2.GC_PR_FGD
        return _pieces_at(_grab(frame_HWC, labels_HW, (0, 0, width, height)), prompt)
    left, top, right, bottom = _whole(prompt.box, width, height)
    window = _widened((left, top, right, bottom), width, height)
    best_HW, best = np.zeros((height, width), np.bool_), -1.0
    for start in STARTS:
        labels_HW = np.full((height, width), cv2.GC_BGD, np.uint8)
        inside_HW = labels_HW[top:bottom, left:right]
        inside_HW[:] = cv2.GC_PR_FGD if start is None else cv2.GC_PR_BGD
        if start is not None:
            axes = (int(start * (right - left)) // 2, int(start * (bottom - top)) // 2)
            middle = ((left + right) // 2, (top + bottom) // 2)
            cv2.ellipse(labels_HW, middle, axes, 0, 0, 360, int(cv2.GC_PR_FGD), -1)
        _mark_points(labels_HW, prompt)
        cut_HW = _grab(frame_HWC, labels_HW, window)
        fit = _fit(cut_HW, prompt)
        if fit > best + BETTER:
            best_HW, best = cut_HW, fit
    return best_HW


def _mark_points(labels_HW: NDArray[np.uint8], prompt: Prompt) -> None:
    radius = max(1, round(POINT_DISC * min(labels_HW.shape)))
    for point in prompt.points:
        value = cv2.GC_FGD if point.is_inside else cv2.GC_BGD
        cv2.circle(labels_HW, (round(point.x), round(point.y)), radius, int(value), -1)


def _like_points(frame_HWC: Frame, labels_HW: NDArray[np.uint8]) -> Mask:
    """Unmarked pixels of the colours at the points, connected with them: GrabCut's first guess."""
    at_HW = labels_HW == cv2.GC_FGD
    lab_HWC = cv2.cvtColor(frame_HWC.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    near = (
        _distances(lab_HWC.reshape(-1, 3).astype(np.float32), _palette(frame_HWC, at_HW)[::8])
        < ALIKE
    )
    alike_HW = near.reshape(at_HW.shape) & (labels_HW != cv2.GC_BGD)
    _, pieces_HW = cv2.connectedComponents(alike_HW.astype(np.uint8))
    connected_HW: Mask = np.isin(pieces_HW, np.unique(pieces_HW[at_HW & alike_HW]))
    found_HW: Mask = connected_HW & alike_HW & ~at_HW
    return found_HW


def _grab(
    frame_HWC: Frame, labels_HW: NDArray[np.uint8], window: tuple[int, int, int, int]
) -> Mask:
    left, top, right, bottom = window
    labels = np.ascontiguousarray(labels_HW[top:bottom, left:right])
    is_entity = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    cut_HW = np.zeros(labels_HW.shape, np.bool_)
    if is_entity.all() or not is_entity.any():  # nothing to tell it from
        cut_HW[top:bottom, left:right] = is_entity
        return cut_HW
    pixels = np.ascontiguousarray(frame_HWC[top:bottom, left:right])
    cv2.setRNGSeed(0)  # GrabCut begins with k-means
    cv2.grabCut(pixels, labels, _NO_BOX, _empty(), _empty(), ROUNDS, cv2.GC_INIT_WITH_MASK)
    cut_HW[top:bottom, left:right] = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return cut_HW


def _pieces_at(cut_HW: Mask, prompt: Prompt) -> Mask:
    """The connected pieces that points are on: colours alone are found anywhere."""
    _, pieces_HW = cv2.connectedComponents(cut_HW.astype(np.uint8))
    height, width = cut_HW.shape
    at = {
        int(pieces_HW[min(height - 1, int(p.y)), min(width - 1, int(p.x))])
        for p in prompt.points
        if p.is_inside
    }
    return np.isin(pieces_HW, [piece for piece in at if piece])


def _learnt_colours(frame_HWC: Frame, mask_HW: Mask) -> _Colours | None:
    """Of an entity and its surroundings; None where they would not find its mask again."""
    box = box_of(mask_HW)
    if box is None:
        return None
    left, top, right, bottom = _widened(box, *mask_HW.shape[::-1])
    labels = np.where(mask_HW[top:bottom, left:right], cv2.GC_FGD, cv2.GC_BGD).astype(np.uint8)
    if labels.min() == labels.max():
        return None
    colours = _Colours(_empty(), _empty())
    pixels = np.ascontiguousarray(frame_HWC[top:bottom, left:right])
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, labels, _NO_BOX, colours.around, colours.entity, 1, cv2.GC_INIT_WITH_MASK)
    found_HW = _cut(frame_HWC, mask_HW.astype(np.float32), np.zeros_like(mask_HW), colours)
    return colours if iou(found_HW, mask_HW) >= SAME else None


def _cut(frame_HWC: Frame, carried_HW: Floats, others_HW: Mask, colours: _Colours) -> Mask:
    """Draws the edge anew within a band around the mask that the flow carried."""
    mask_HW = carried_HW > 0.5
    height, width = mask_HW.shape
    radius = max(1, round(BAND * min(height, width)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    core_HW = cv2.erode(mask_HW.astype(np.uint8), disc) > 0
    reach_HW = cv2.dilate(mask_HW.astype(np.uint8), disc) > 0
    labels_HW = np.where(mask_HW, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels_HW[core_HW] = cv2.GC_FGD
    labels_HW[~reach_HW | (others_HW & ~mask_HW)] = cv2.GC_BGD
    box = box_of(reach_HW)
    assert box is not None  # the mask is not empty
    left, top, right, bottom = _widened(box, width, height)
    labels = np.ascontiguousarray(labels_HW[top:bottom, left:right])
    pixels = np.ascontiguousarray(frame_HWC[top:bottom, left:right])
    around, entity = colours.around.copy(), colours.entity.copy()
    cv2.grabCut(pixels, labels, _NO_BOX, around, entity, 1, cv2.GC_EVAL_FREEZE_MODEL)
    cut_HW = np.zeros((height, width), np.bool_)
    cut_HW[top:bottom, left:right] = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return cut_HW


def _flow_back(before_HWC: Frame, after_HWC: Frame) -> tuple[Floats, Mask]:
    """Flow from a frame to the one before it, and where the flow forth leads back."""
    before, after = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (before_HWC, after_HWC))
    dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    back_HW2 = np.asarray(dis.calc(after, before, None), np.float32)
    forth_HW2 = np.asarray(dis.calc(before, after, None), np.float32)
    returned_HW2 = back_HW2 + _sampled(forth_HW2, back_HW2)
    gap_HW = np.linalg.norm(returned_HW2, axis=2)
    speed_HW = np.linalg.norm(back_HW2, axis=2)
    return back_HW2, gap_HW < RETURNS[0] + RETURNS[1] * speed_HW


def _sampled(image: Floats, at_HW2: Floats) -> Floats:
    """An image at every pixel plus a shift; 0 outside."""
    height, width = at_HW2.shape[:2]
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    return np.asarray(
        cv2.remap(image, xx + at_HW2[..., 0], yy + at_HW2[..., 1], cv2.INTER_LINEAR), np.float32
    )


def _one_owner(cut_EHW: Floats, carried_EHW: Floats) -> Floats:
    """Leaves each pixel that several claim to the one that the flow gives most of it."""
    claims_EHW = np.where(cut_EHW > 0.5, carried_EHW + 1e-3, -1.0)
    owner_HW = claims_EHW.argmax(0)
    shared_HW = (cut_EHW > 0.5).sum(0) > 1
    owned_EHW = cut_EHW.copy()
    for number in range(len(cut_EHW)):
        owned_EHW[number][shared_HW & (owner_HW != number)] = 0.0
    return owned_EHW


def _exclusive(masks: list[Mask], frame_HWC: Frame) -> list[Mask]:
    """Gives each pixel that several entities claim to one of them.

    To the one that lies in the others, such as a tie on a man; else to the one whose other pixels
    look most alike.
    """
    shared_HW = np.sum(masks, axis=0) > 1
    if not shared_HW.any():
        return masks
    own = [mask_HW & ~shared_HW for mask_HW in masks]
    lab_HWC = cv2.cvtColor(frame_HWC.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    far_EN = []
    for mask_HW, own_HW in zip(masks, own, strict=True):
        is_part = own_HW.sum() < PART * mask_HW.sum()
        palette_NC = _palette(frame_HWC, own_HW)
        far_N = -1.0 if is_part else _distances(lab_HWC[shared_HW], palette_NC)
        far_EN.append(np.where(mask_HW[shared_HW], far_N, np.inf))
    owner_N = np.argmin(far_EN, axis=0)
    for number, own_HW in enumerate(own):
        own_HW[shared_HW] = owner_N == number
    return own


def _palette(frame_HWC: Frame, mask_HW: Mask) -> Floats:
    """Some of the colours of a mask in CIELAB, `(N, C)`, drawn evenly."""
    pixels_NC = frame_HWC[mask_HW]
    few_NC = pixels_NC[np.linspace(0, len(pixels_NC) - 1, min(len(pixels_NC), PALETTE)).astype(int)]
    scaled_1NC = few_NC[None].astype(np.float32) / 255
    if not len(few_NC):
        return np.zeros((0, 3), np.float32)
    return np.asarray(cv2.cvtColor(scaled_1NC, cv2.COLOR_RGB2LAB)[0], np.float32)


def _distances(pixels_NC: Floats, palette_MC: Floats) -> Floats:
    """CIELAB distance of colours to the nearest of a palette; far where that has none."""
    if not len(palette_MC):
        return np.full(len(pixels_NC), 1e6, np.float32)
    gaps_NMC = pixels_NC[:, None] - palette_MC[None]
    return np.asarray(np.linalg.norm(gaps_NMC, axis=2).min(1), np.float32)


def _likeness(first_NC: Floats, now_NC: Floats) -> float:
    """The smaller share of colours of either palette that the other one has."""
    if not len(first_NC) or not len(now_NC):
        return 0.0
    shares = (_distances(a, b) < ALIKE for a, b in ((first_NC, now_NC), (now_NC, first_NC)))
    return min(float(share.mean()) for share in shares)


def _fit(mask_HW: Mask, prompt: Prompt) -> float:
    """IoU of a box that was given with the one around the mask: boxes are meant to be tight."""
    found = box_of(mask_HW)
    if prompt.box is None:
        return 1.0
    if found is None:
        return 0.0
    given = _whole(prompt.box, *mask_HW.shape[::-1])
    width, height = (
        max(0, min(a, b) - max(c, d))
        for a, b, c, d in zip(given[2:], found[2:], given[:2], found[:2], strict=True)
    )
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (given, found))
    return width * height / (sum(areas) - width * height)


def _empty() -> NDArray[np.float64]:
    return np.zeros((1, 65), np.float64)


def _whole(box: tuple[float, ...], width: int, height: int) -> tuple[int, int, int, int]:
    left, top = min(width - 1, max(0, int(box[0]))), min(height - 1, max(0, int(box[1])))
    right, bottom = (min(n, int(np.ceil(x))) for x, n in zip(box[2:], (width, height), strict=True))
    return left, top, max(left + 1, right), max(top + 1, bottom)


def _widened(box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    x, y = (max(4, round(SURROUNDINGS * n)) for n in (right - left, bottom - top))
    return max(0, left - x), max(0, top - y), min(width, right + x), min(height, bottom + y)


def _worked_on(frame_HWC: Frame) -> Frame:
    """A frame in the size that it is worked on."""
    longer = max(frame_HWC.shape[:2])
    scale = min(max(longer, LONGER_SIDE[0]), LONGER_SIDE[1]) / longer
    if scale == 1:
        return frame_HWC
    height, width = (max(1, round(n * scale)) for n in frame_HWC.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame_HWC, (width, height), interpolation=how), np.uint8)


def _scaled(prompts: Sequence[Prompt], frame_HWC: Frame, work_HWC: Frame) -> list[Prompt]:
    """Prompts in the pixels of the size that is worked on."""
    height, width = work_HWC.shape[:2]
    x, y = width / frame_HWC.shape[1], height / frame_HWC.shape[0]
    scaled = []
    for prompt in prompts:
        box, mask_HW = prompt.box, prompt.mask_HW
        if box is not None:
            box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        if mask_HW is not None:
            mask_HW = cv2.resize(mask_HW.astype(np.float32), (width, height)) > 0.5
        points = tuple(Point(p.x * x, p.y * y, p.is_inside) for p in prompt.points)
        scaled.append(Prompt(prompt.phrase, box, points, mask_HW))
    return scaled


def _enlarged(shares_EHW: Floats, size_HW: tuple[int, ...]) -> NDArray[np.bool_]:
    size = (size_HW[1], size_HW[0])
    return np.stack(
        [
            cv2.resize(share_HW, size, interpolation=cv2.INTER_LINEAR) > 0.5
            for share_HW in shares_EHW
        ]
    )
