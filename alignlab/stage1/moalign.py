"""Stage 1 of MoAlign: the motion head learns to read optical flow off teacher tokens.

Shape letters: B batch, T time steps of the teacher, F pixel frames, P tokens per frame, H, W
pixels, C the two directions (x, y), D width of the teacher.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from alignlab.errors import UserError
from alignlab.kernels.host_copy import to_device
from alignlab.losses.objective import Grid
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig, flow_l1
from alignlab.randomness import derive_seed
from alignlab.stage1.task import FrozenModels, Stage1Settings, Stage1Task
from alignlab.training.encoded import ClipPixels


@dataclass(frozen=True)
class MoAlignClip:
    """A clip's teacher tokens on `grid`, and the flow `(T-1, P, 2)` between their time steps."""

    features_TPD: Tensor
    grid: Grid
    flow_TPC: Tensor


class MoAlignStage1(Stage1Settings):
    """MoAlign's motion head (losses/stage1/motion_head.py)."""

    kind: Literal["moalign"]
    width: int = Field(default=64, ge=1)
    """Width of the motion space. MoAlign's."""
    hidden: int = Field(default=256, ge=1)
    """Width of the convolution before it. Ours."""
    decoder: int = Field(default=128, ge=1)
    """Width of the flow decoder. Ours."""
    flow: Literal["auto", "dis"] = "auto"
    """Flow to learn: `auto` takes the data set's where it has exact flow, else OpenCV's DIS;
    `dis` always estimates."""


@final
class MoAlignTask(Stage1Task[MoAlignClip]):
    """Mean absolute error of the flow that is decoded from the motion space."""

    Settings: ClassVar[type[Stage1Settings]] = MoAlignStage1
    reads_text: ClassVar[bool] = False
    network: MotionHead

    def __init__(self, settings: Stage1Settings, models: FrozenModels, *, seed: int) -> None:
        assert isinstance(settings, MoAlignStage1)
        self._settings, self._models = settings, models
        self.shape = MotionHeadConfig(
            teacher_dim=models.teacher.dim,
            width=settings.width,
            hidden=settings.hidden,
            decoder=settings.decoder,
        )
        network = MotionHead(self.shape, seed=derive_seed(seed, "stage1-moalign"))
        self.network = network.to(models.device)

    def encode(self, pixels: ClipPixels) -> MoAlignClip:
        """Teacher tokens and flow of one clip."""
        sample, features = pixels.sample, self._models.features(pixels)
        if features.grid[0] < 2:
            raise UserError(
                f"data.frames: {len(sample.video_THWC)} frames give the teacher "
                f"{features.grid[0]} time step; flow needs two"
            )
        exact = sample.flow_THWC if self._settings.flow == "auto" else None
        flow_FHWC = dis_flow(sample.video_THWC) if exact is None else exact
        flow_TPC = flow_on_grid(flow_FHWC, features.grid)
        return MoAlignClip(features.tokens_BTPD[0], features.grid, flow_TPC)

    def loss(self, clips: Sequence[MoAlignClip]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error of the decoded flow, in token-grid units."""
        flow_BTPC = to_device(torch.stack([clip.flow_TPC for clip in clips]), self._models.device)
        total = flow_l1(self._decoded(clips), flow_BTPC).mean()
        return total, {"loss/total": total.detach()}

    @torch.no_grad()
    def evaluate(self, clips: Iterable[MoAlignClip]) -> dict[str, float]:
        """Mean absolute errors in token-grid units.

        `val/flow_l1` is the head's. Beside it those of predicting no motion (`_zero`), the mean
        flow of the measured clips (`_mean`) and the mean flow of the very clip (`_clip_mean`);
        the latter two know the answer's mean.
        """
        seen = list(clips)
        flow_BTPC = torch.stack([clip.flow_TPC for clip in seen])
        decoded_BTPC = torch.cat([self._decoded([clip]).cpu() for clip in seen])
        constant = {
            "val/flow_l1_zero": torch.zeros(2),
            "val/flow_l1_mean": flow_BTPC.mean((0, 1, 2)),
            "val/flow_l1_clip_mean": flow_BTPC.mean((1, 2), keepdim=True),
        }
        guesses = {"val/flow_l1": decoded_BTPC} | constant
        return {
            name: float(flow_l1(guess.expand_as(flow_BTPC), flow_BTPC).mean())
            for name, guess in guesses.items()
        }

    def _decoded(self, clips: Sequence[MoAlignClip]) -> Tensor:
        grid = clips[0].grid
        features_BTPD = torch.stack([clip.features_TPD for clip in clips])
        features_BTPD = to_device(features_BTPD, self._models.device)
        flow_BTPC: Tensor = self.network.flow(self.network.motion(features_BTPD, grid), grid)
        return flow_BTPC


def flow_on_grid(flow_FHWC: Tensor, grid: Grid) -> Tensor:
    """Brings flow between pixel frames to the tokens and time steps of a teacher.

    A token gets the mean over its pixels, in units of its own width and height. Flows of the
    frames between two time steps are summed: a teacher that sees every frame has one each; one with
    tubelets of g frames, which leaves the first frame out, has g, from a tubelet's first frame to
    the next one's. (MoAlign's rule is not known. A sum at one place follows no pixel; it is right
    for motion that is smooth over a token.)

    Args:
        flow_FHWC: `(F-1, H, W, 2)` in pixels per frame, x then y, of a clip of F frames.
        grid: (T, H, W) of the teacher's tokens.

    Returns:
        `(T-1, P, 2)` in token-grid units per time step.

    Raises:
        ValueError: the frames do not correspond.
    """
    gaps, pixels_H, pixels_W = flow_FHWC.shape[:3]
    steps, tokens_H, tokens_W = grid
    if steps == gaps + 1:
        group, start = 1, 0
    elif 0 < steps <= gaps and gaps % steps == 0:
        group, start = gaps // steps, 1
    else:
        raise ValueError(f"flow of {gaps + 1} frames does not fit {steps} time steps")
    used = flow_FHWC[start : start + group * (steps - 1)]
    summed = used.reshape(steps - 1, group, *used.shape[1:]).sum(1)
    pooled_TCHW = F.interpolate(summed.movedim(-1, 1), size=(tokens_H, tokens_W), mode="area")
    tokens_TPC = pooled_TCHW.flatten(2).mT
    return tokens_TPC * torch.tensor([tokens_W / pixels_W, tokens_H / pixels_H])


def dis_flow(video_THWC: Tensor) -> Tensor:
    """Estimates the forward flow between consecutive frames.

    DIS with its medium preset on grey values. MoAlign uses RAFT, whose weights would have to be
    fetched.

    Args:
        video_THWC: uint8 RGB frames.

    Returns:
        float32 `(T-1, H, W, 2)` in pixels per frame, x then y: what is at (x, y) in a frame is at
        (x, y) + flow in the next.
    """
    import cv2  # here: recipes are read without it

    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video_THWC.cpu().numpy()]
    # Any, because its stub knows no call without a first guess
    dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    # with spatial propagation, as its presets have it, the number of threads changes no number
    flows = [np.array(dis.calc(before, after, None)) for before, after in pairwise(grey)]
    shape = (0, *video_THWC.shape[1:3], 2)
    return torch.from_numpy(np.stack(flows)) if flows else torch.zeros(shape)
