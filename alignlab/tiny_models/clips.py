"""A pool of rendered shapes clips that the asset stages draw from."""

import torch
from torch import Tensor

from alignlab.config.data import ShapesConfig
from alignlab.data.sample import Sample
from alignlab.data.shapes.dataset import ShapesDataset

FRAMES = 9
SIZE = (64, 64)


def shapes_clips(
    count: int, *, subjects: tuple[int, int] = (2, 3), seed: int = 1000
) -> ShapesDataset:
    """The first `count` training clips with so many subjects each.

    The default seed differs from the default recipes' 0, so that the assets never saw the clips
    that experiments train or validate on.
    """
    config = ShapesConfig(
        frames=FRAMES, size=SIZE, references=subjects, train_clips=count, val_clips=1, seed=seed
    )
    return ShapesDataset(config, "train")


class ClipPool:
    """Renders clips once and serves random batches of them."""

    def __init__(self, clips: ShapesDataset) -> None:
        self.samples: list[Sample] = [clips[index] for index in range(len(clips))]

    def draw(self, rng: torch.Generator, count: int) -> list[Sample]:
        """`count` samples with replacement."""
        picks = torch.randint(len(self.samples), (count,), generator=rng)
        return [self.samples[i] for i in picks.tolist()]

    def videos(self, rng: torch.Generator, count: int, frames: int) -> Tensor:
        """uint8 `(count, frames, H, W, C)`: random clips, random start frame."""
        starts = torch.randint(FRAMES - frames + 1, (count,), generator=rng).tolist()
        samples = self.draw(rng, count)
        return torch.stack(
            [s.video_THWC[i : i + frames] for s, i in zip(samples, starts, strict=True)]
        )

    def reference_images(self, rng: torch.Generator, count: int) -> Tensor:
        """uint8 `(count, 1, H, W, C)`: the first reference of random clips."""
        samples = self.draw(rng, count)
        return torch.stack([s.references[0].image_HWC[None] for s in samples])
