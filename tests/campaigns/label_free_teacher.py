"""Trains an image encoder like tiny-dino without labels, by masked image modelling; by hand.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -P tests/campaigns/label_free_teacher.py OUT

Same architecture and optimizers as tiny-dino. Half of the patches are replaced by a
mask token, and a linear layer predicts their pixels, normalised patch by patch (SimMIM, arXiv
2111.09886; the target's normalisation is MAE's, arXiv 2111.06377). The folder is one that
`{family: dinov2, path: FOLDER}` reads; the recipe is tiny_dino/label_free.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignlab.randomness import generator
from alignlab.tiny_models.clips import ClipPool, shapes_clips
from alignlab.tiny_models.dino import CLIPS_PER_STEP, PATCH, DinoWithHeads, normalise
from alignlab.tiny_models.stage import train_stage

MASKED = 0.5
EPS = 1e-4


class MaskedImageModel(nn.Module):
    """The encoder, and the layer that predicts what is under the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = DinoWithHeads().backbone
        self.pixels = nn.Linear(96, 3 * PATCH * PATCH)

    def loss(self, images_BHWC: Tensor, masked_BP: Tensor) -> Tensor:
        """Mean squared error of the pixels of masked patches."""
        pixels_BCHW = normalise(images_BHWC)
        found = self.backbone(pixels_BCHW, bool_masked_pos=masked_BP).last_hidden_state[:, 1:]
        target_BPE = F.unfold(pixels_BCHW, PATCH, stride=PATCH).mT
        deviation, mean = torch.std_mean(target_BPE, -1, keepdim=True)
        target_BPE = (target_BPE - mean) / (deviation + EPS)
        return F.mse_loss(self.pixels(found)[masked_BP], target_BPE[masked_BP])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--clips", type=int, default=2048)
    options = parser.parse_args()
    torch.manual_seed(1)
    model, clips = MaskedImageModel(), ClipPool(shapes_clips(options.clips))

    def loss_at(step: int) -> dict[str, Tensor]:
        rng = generator(0, "masked images", step)
        videos_BTHWC = clips.videos(rng, 2 * CLIPS_PER_STEP, 1)
        count = (64 // PATCH) ** 2
        order_BP = torch.rand(len(videos_BTHWC), count, generator=rng).argsort(-1)
        return {"pixels": model.loss(videos_BTHWC[:, 0], order_BP < MASKED * count)}

    with tempfile.TemporaryDirectory() as work:
        train_stage("masked images", model, loss_at, steps=options.steps, work=Path(work))
    model.backbone.save_pretrained(options.out)
    print(f"{options.out}: {sum(p.numel() for p in model.backbone.parameters()):,} weights")


if __name__ == "__main__":
    main()
