"""What the features of diffusion teachers are centred by.

Most of a token of a diffusion transformer is one direction that all tokens share; without it a
cosine tells tokens apart. Shape letters: T frames, P tokens per frame, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from alignlab.data.sample import ClipDataset
from alignlab.dataset_cache.clip_keys import DECODERS, content_digest, teacher_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.key import CacheKey, Part, StorageDtype, digest_of
from alignlab.progress import step_progress
from alignlab.training.encoded import ClipPixels, Encoded, FeatureRead, feature_key, kept_features

CENTRE_CLIPS = 64
"""The first clips of the data set: their tokens are averaged; all of them if there are fewer."""


def centre_clips(dataset: ClipDataset) -> list[ClipPixels]:
    """Those clips; nothing is decoded."""
    return [ClipPixels(dataset, index) for index in range(min(CENTRE_CLIPS, len(dataset)))]


def kept_centre(
    values: EncodedValues,
    read: FeatureRead,
    clips: Sequence[ClipPixels],
    encoded: Callable[[int], Encoded],
) -> Tensor:
    """Mean of a teacher's features over clips and tokens, fp32 (D,) on the CPU; kept as an entry.

    The entry is fp32 in any cache: what rounds a feature differs from token to token, what rounds
    the mean would be taken from all of them.

    Args:
        values: where it and the features are kept.
        read: of which teacher.
        clips: that are averaged.
        encoded: gives a clip's latents and text by its index.
    """

    def make() -> dict[str, Tensor]:
        total_D, count = torch.zeros(read.teacher.dim, dtype=torch.float64), 0
        label = f"{read.teacher.name}: mean of its features"
        with step_progress(label, total=len(clips)) as advance:
            for number, pixels in enumerate(clips, start=1):
                rows_TPD = kept_features(values, read, pixels, partial(encoded, pixels.index))
                rows_ND = rows_TPD.flatten(0, 1).cpu()
                total_D += rows_ND.double().sum(0)
                count += len(rows_ND)
                advance(number, "")
        return {"mean_D": (total_D / count).float()}

    def refusal() -> str:
        return f"{read.teacher.name}: the mean of its features is not finite: take other weights"

    key = partial(centre_key, read, clips, values.cache.dtype)
    return values.get("teacher", key, make, refusal)["mean_D"].cpu()


def centre_key(read: FeatureRead, clips: Sequence[ClipPixels], dtype: StorageDtype) -> CacheKey:
    """Names it by the clips, all that their features depend on, and what these are stored in."""
    keys = [feature_key(read, pixels) for pixels in clips]
    averaged = {str(i): content_digest(key.kind, key.parts) for i, key in enumerate(keys)}
    decoders: dict[str, Part] = {
        name: tuple(dict.fromkeys(part for key in keys if (part := key.parts.get(name))))
        for name in DECODERS
    }
    clips_digest = digest_of("clips", averaged)
    named: dict[str, Part] = {"of": "mean", "clips": clips_digest, "dtype": dtype, **decoders}
    return replace(teacher_key(named, read.teacher.parts, read.grid_HW), is_exact=True)
