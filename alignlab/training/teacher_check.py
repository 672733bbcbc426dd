"""Whether a teacher's features say anything, by those of two different clips of noise, and whether
they are what it was asked for.

Shape letters: B batch, T frames, H, W pixels, C channels, P tokens per frame, D width, L text
tokens.
"""

from typing import Any

import torch
from torch import Tensor

from alignlab.data.registry import DataConfig
from alignlab.dataset_cache.clip_keys import teacher_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.key import CacheKey, Part
from alignlab.errors import UserError
from alignlab.losses.objective import Features
from alignlab.teachers import DiffusionTeacher
from alignlab.training.encoded import FeatureRead

SAME_FEATURES = 1e-6  # of the largest value: rounding of fp32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_noise(where: str, read: FeatureRead, data: DataConfig, values: EncodedValues) -> None:
    """`check_features` of a teacher's features of `noise_clips`, which are kept like any others."""
    frames = data.frames if read.teacher.is_video else 1

    def make() -> dict[str, Tensor]:
        if isinstance(read.teacher, DiffusionTeacher):
            features = read.teacher.encode(*noise_latents(read.teacher))
        else:
            features = read.teacher.encode(noise_clips(frames, data.size), read.grid_HW)
        tokens_BTPD = features.tokens_BTPD
        check_features(where, tokens_BTPD)
        return {"tokens_BTPD": tokens_BTPD}

    def refusal() -> str:
        return _not_finite(where)

    def key() -> CacheKey:
        return noise_key(read, data)

    check_features(where, values.get("teacher", key, make, refusal)["tokens_BTPD"])


def noise_key(read: FeatureRead, data: DataConfig) -> CacheKey:
    """Names a teacher's features of `noise_clips` in the dataset cache."""
    frames = data.frames if read.teacher.is_video else 1
    noise: dict[str, Part] = {"of": "noise", "frames": frames, "size": tuple(data.size)}
    return teacher_key(noise, read.teacher.parts, read.grid_HW)


def _not_finite(where: str) -> str:
    return f"{where}: gives features that are not finite; take other weights"


def noise_clips(frames: int, size_HW: tuple[int, int]) -> Tensor:
    """A dark and a bright clip of noise, uint8 (2, T, H, W, 3)."""
    generator = torch.Generator().manual_seed(0)
    dark, bright = (
        torch.randint(low, low + 128, (frames, *size_HW, 3), generator=generator, dtype=torch.uint8)
        for low in (0, 128)
    )
    return torch.stack([dark, bright])


def noise_latents(teacher: DiffusionTeacher) -> tuple[Tensor, Tensor]:
    """Two latents of noise, (2, C, T, H, W), and texts of one token of zeros, (2, 1, D)."""
    generator = torch.Generator().manual_seed(0)
    latents_BCTHW = torch.randn(2, *teacher.latent_shape, generator=generator)
    return latents_BCTHW, torch.zeros(2, 1, teacher.text_dim)


def check_features(where: str, tokens_BTPD: Tensor) -> None:
    """Refuses features of two clips that are not finite, or are the same.

    Raises:
        UserError: begins with `where`.
    """
    if not tokens_BTPD.isfinite().all():
        raise UserError(_not_finite(where))
    dark, bright = tokens_BTPD
    if float((dark - bright).abs().max()) <= SAME_FEATURES * float(tokens_BTPD.abs().max()):
        raise UserError(
            f"{where}: gives the same features whatever it sees, so there is nothing to align "
            "with; take other weights or another feature"
        )


def checked_tokens(
    where: str, teacher: Any, found: object, num_frames: int, grid_HW: tuple[int, int]
) -> Tensor:
    """The tokens that a teacher of another package gave for one clip; waits for no device.

    Args:
        where: for the message.
        teacher: has `dim` and `is_video`.
        found: what its `encode` gave.
        num_frames: that it was given.
        grid_HW: that it was asked for.

    Returns:
        (T, P, D).

    Raises:
        UserError: they are not what it was asked for.
    """
    expected = f"{where} must give alignlab.losses.objective.Features"
    if not isinstance(found, Features):
        raise UserError(f"{expected}, not {type(found).__name__}")
    tokens_BTPD: Any = found.tokens_BTPD
    if not isinstance(tokens_BTPD, Tensor):
        raise UserError(f"{expected} with a tensor, not {type(tokens_BTPD).__name__}")
    batch, width, (frames, *own_HW) = len(tokens_BTPD), tokens_BTPD.shape[-1], found.grid
    grids = [f"{height}x{width}" for height, width in (grid_HW, own_HW)]
    if (width, *own_HW) != (teacher.dim, *grid_HW):
        raise UserError(
            f"{expected} of width {teacher.dim} on the grid {grids[0]} that it is asked for, not "
            f"of width {width} on {grids[1]}"
        )
    if tokens_BTPD.dtype not in DTYPES:
        dtypes, dtype = (
            ", ".join(str(one).removeprefix("torch.") for one in ones)
            for ones in (DTYPES, [tokens_BTPD.dtype])
        )
        raise UserError(f"{expected} in one of {dtypes}, not in {dtype}")
    asked = f"{num_frames} frames, as many as it is given"
    is_right = frames == num_frames
    if teacher.is_video:
        asked = f"frames that share the {num_frames - 1} after the first evenly (is_video)"
        is_right = frames > 0 and (num_frames - 1) % frames == 0
    if batch != 1 or not is_right:
        raise UserError(f"{expected} of 1 clip with {asked}, not of {batch} with {frames}")
    return tokens_BTPD[0]
