"""Whether a teacher's features say anything, by those of two different clips of noise.

Shape letters: B batch, T frames, H, W pixels, C channels, P tokens per frame, D width, L text
tokens.
"""

import torch
from torch import Tensor

from alignlab.data.registry import DataConfig
from alignlab.dataset_cache.clip_keys import teacher_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.key import CacheKey, Part
from alignlab.errors import UserError
from alignlab.teachers import DiffusionTeacher
from alignlab.training.encoded import FeatureRead

SAME_FEATURES = 1e-6  # of the largest value: rounding of fp32


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
