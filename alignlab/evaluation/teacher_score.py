"""How teachers see a data set, before anything is trained: which encoder is worth aligning to?

Shape letters: T frames, P patches of a frame, D width, F frames of all clips, H, W, C pixels.
"""

import re
import time
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import Tensor

from alignlab.config.parts import TeacherConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.data.registry import build_dataset
from alignlab.data.sample import Sample
from alignlab.errors import UserError
from alignlab.losses.grids import FOREGROUND, covered_share, share_is_decided
from alignlab.losses.objective import Features, Grid
from alignlab.metrics import frequency_bands, iicr, temporal_stability
from alignlab.metrics.spatial import spatial_structure
from alignlab.progress import step_progress, tell
from alignlab.runs.log_filters import quiet_libraries
from alignlab.teachers import TEACHERS, teacher_from
from alignlab.training.measure import PeakMemory
from alignlab.units import MIB

NEIGHBOURS = (8, 10, 12, 15)  # of Align4Gen's published curve


@dataclass(frozen=True)
class TeacherCost:
    """What one clip's features cost, with the model loaded.

    Args:
        seconds: median of the clips but the first, by the clock.
        weights_mib: of the weights as they are loaded.
        peak_mib: most memory allocated above that on a GPU; None on a CPU, where freed memory stays
            with the process, so that the second teacher's growth would be nothing.
        features_mib: of the features in fp32.
    """

    seconds: float
    weights_mib: float
    peak_mib: float | None
    features_mib: float


@dataclass(frozen=True)
class TeacherScore:
    """What one teacher sees.

    Args:
        alias: in the recipe.
        config: its settings.
        grid: (T, H, W) of its tokens for one clip.
        iicr: IICR-like score by number of neighbours, see `alignlab.metrics.iicr`; without those
            that the clips have too few frames for.
        chance: what guessing gives for any of them.
        spatial: means over frames and clips of `lds`, `cds`, `srss` and `rmsc`
            (`alignlab.metrics.spatial`); a frame without such pairs of tokens counts in none, and
            a measure that no frame has is left out: a small grid has no distant tokens, and `srss`
            needs entity masks.
        frequency: mean share of spatial power by band (`alignlab.metrics.frequency`); none where no
            frame has any.
        stability: mean over clips of `temporal_stability`; None for clips of one frame.
        cost: of a clip.
        middle: tokens (P, D) of the middle frame of each clip, on the CPU.
    """

    alias: str
    config: TeacherConfig
    grid: Grid
    iicr: dict[int, float]
    chance: float
    spatial: dict[str, float]
    frequency: tuple[float, ...]
    stability: float | None
    cost: TeacherCost
    middle: tuple[Tensor, ...]


@quiet_libraries()
def score_teachers(
    config: RunConfig, *, clips: int | None = None, size: tuple[int, int] | None = None
) -> tuple[list[TeacherScore], list[Sample]]:
    """Scores every teacher of a recipe that reads frames on its first val clips.

    Args:
        config: `teachers` and `data` are read.
        clips: how many; None takes `eval.clips`.
        size: patches (H, W) of every teacher, by resizing the frames; None takes the teacher's own
            `grid`, or else one patch per patch size of the frames as they are. Distances are
            counted in patches, so teachers with other grids are compared at other scales.

    Returns:
        a score for each, and the clips.

    Raises:
        UserError: the recipe has no teachers or one that cannot be used, or there are fewer than
            two clips.
    """
    encoders = {
        alias: teacher
        for alias, teacher in config.teachers.items()
        if TEACHERS[teacher.family].reads == "frames"
    }
    left_out = [alias for alias in config.teachers if alias not in encoders]
    if left_out:
        tell(f"not scored, since they read latents: {', '.join(left_out)}")
    if not encoders:
        raise UserError("teachers: the recipe has none to score")
    dataset = build_dataset(config.data, "val", memory=user_path(config.output))
    samples = [dataset[i] for i in range(min(clips or config.eval.clips, len(dataset)))]
    if len(samples) < 2:
        raise UserError("teachers are scored on two clips or more, and there is one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores: list[TeacherScore] = []
    total = len(encoders) * len(samples)
    with step_progress("score", total=total) as advance:
        for alias, teacher_config in encoders.items():
            teacher = teacher_from(teacher_config, device=device)
            height, width = (side // teacher.patch_size for side in config.data.size)
            grid_HW = size or teacher.grid or (height, width)
            features, seconds = [], []
            teacher.load()
            memory = PeakMemory(torch.device(device))
            before = memory.peak_mib()
            for sample in samples:
                begun = time.perf_counter()
                features.append(_on_cpu(teacher.encode(sample.video_THWC[None], grid_HW)))
                seconds.append(time.perf_counter() - begun)  # on the CPU they are there
                advance(len(scores) * len(samples) + len(features), alias)
            cost = TeacherCost(
                median(seconds[1:]),
                teacher.weights_bytes() / MIB,
                memory.peak_mib() - before if device == "cuda" else None,
                _mib(features[:1]),
            )
            scores.append(_score(alias, teacher_config, features, samples, cost))
    return scores, samples


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) of a text such as `14x14`.

    Raises:
        UserError: another form, or a zero.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--grid: {text!r} is no height x width in patches, such as 14x14")
    return int(match[1]), int(match[2])


def _on_cpu(features: Features) -> Features:
    return Features(features.tokens_BTPD.cpu(), features.grid)


def _mib(features: list[Features]) -> float:
    return sum(f.tokens_BTPD.numel() * f.tokens_BTPD.element_size() for f in features) / MIB


def _score(
    alias: str,
    config: TeacherConfig,
    features: list[Features],
    samples: list[Sample],
    cost: TeacherCost,
) -> TeacherScore:
    grid = features[0].grid
    clips = [f.tokens_BTPD[0] for f in features]
    pooled_FD = torch.cat([clip_TPD.mean(1) for clip_TPD in clips])
    videos_F = torch.arange(len(features)).repeat_interleave(grid[0])
    mean_D = pooled_FD.double().mean(0)
    steady = [x for clip in clips if (x := temporal_stability(clip, mean_D)) is not None]
    return TeacherScore(
        alias,
        config,
        grid,
        {k: iicr(pooled_FD, videos_F, k) for k in NEIGHBOURS if k < len(pooled_FD)},
        (grid[0] - 1) / (len(pooled_FD) - 1),
        _spatial(features, samples),
        _frequency(clips, grid),
        mean(steady) if steady else None,
        cost,
        tuple(clip_TPD[len(clip_TPD) // 2] for clip_TPD in clips),
    )


def _frequency(clips: list[Tensor], grid: Grid) -> tuple[float, ...]:
    shares = [frequency_bands(frame_PD, grid[1:]) for clip in clips for frame_PD in clip]
    return tuple(mean(band) for band in zip(*filter(None, shares), strict=True))


def _spatial(features: list[Features], samples: list[Sample]) -> dict[str, float]:
    values: dict[str, list[float]] = {"lds": [], "cds": [], "srss": [], "rmsc": []}
    for seen, sample in zip(features, samples, strict=True):
        regions = _regions(sample, seen.grid)
        for frame, tokens_PD in enumerate(seen.tokens_BTPD[0]):
            sides = () if regions is None else (side_TP[frame] for side_TP in regions)
            for name, value in spatial_structure(tokens_PD, seen.grid[1:], *sides).items():
                values[name].append(value)
    return {name: sum(v) / len(v) for name, v in values.items() if v}


def _regions(sample: Sample, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Which tokens lie mostly on an entity, and which surely do not, bool (T, P) each; None where
    the masks are unknown."""
    if sample.masks_ETHW is None:
        return None
    share_TP = covered_share(sample.masks_ETHW.any(0), grid)
    inside_TP = share_TP > FOREGROUND
    if sample.undecided_THW is None:
        return inside_TP, ~inside_TP
    undecided_TP = covered_share(sample.undecided_THW, grid)
    return inside_TP, ~inside_TP & share_is_decided(share_TP, undecided_TP)
