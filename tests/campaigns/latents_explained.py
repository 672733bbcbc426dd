"""How much of the clean latents each teacher's features tell, and the other way round; by hand.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -P tests/campaigns/latents_explained.py tiny_dino/latents

A ridge regression, token by token, from the features of a recipe's teachers to the latents of the
same place, patchified as the transformer sees them; fitted to train clips, judged by val clips:
1 - squared error / squared distance from the train clips' mean. An image encoder's frames are
averaged over those that share a latent frame, as VAEs of Wan compress them (1, then 4 each).
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from alignlab.recipe import load_run
from alignlab.teachers.load import teacher_of_clips
from alignlab.training.batches import ClipEncoder
from alignlab.training.encoded import FeatureRead
from alignlab.training.setup import Run, build_run

RIDGE = 1e-4  # of the features' variance
FRAMES_PER_LATENT = 4
PATCH = 2


def latents(clips: ClipEncoder, count: int) -> Tensor:
    """Patchified latents of the first clips, (tokens, values)."""
    rows = []
    for index in range(count):
        z_CTHW = clips[index].latents_CTHW
        z = z_CTHW.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # C T H p W p
        rows.append(z.permute(1, 2, 4, 0, 3, 5).flatten(3).flatten(0, 2))
    return torch.cat(rows).double()


def features(clips: ClipEncoder, count: int, read: FeatureRead, frames: int) -> Tensor:
    """A teacher's features of the same tokens."""
    rows = []
    for index in range(count):
        found_TPD = clips[index].features(read)
        if len(found_TPD) != frames:
            first, rest = found_TPD[:1], found_TPD[1:].unflatten(0, (-1, FRAMES_PER_LATENT))
            found_TPD = torch.cat([first, rest.mean(1)])
        rows.append(found_TPD.flatten(0, 1))
    return torch.cat(rows).double()


def ridge(x_ND: Tensor, y_NE: Tensor) -> Callable[[Tensor], Tensor]:
    """The fitted map."""
    mean, scale = x_ND.mean(0), x_ND.std(0).clamp_min(1e-6)

    def rows(z_ND: Tensor) -> Tensor:
        return torch.cat([(z_ND - mean) / scale, torch.ones_like(z_ND[:, :1])], 1)

    x = rows(x_ND)
    gram = x.mT @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.mT @ y_NE)
    return lambda z_ND: rows(z_ND) @ weights


def explained(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> float:
    """The share of `y` that `x` tells; each of train and val clips."""
    error = (ridge(x[0], y[0])(x[1]) - y[1]).square().sum()
    return float(1.0 - error / (y[1] - y[0].mean(0)).square().sum())


def tokens_of(run: Run, alias: str, counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A teacher's features of train and of val clips."""
    config = run.config
    teacher = teacher_of_clips(
        config.teachers[alias], config.data, run.wan.frozen, alias=alias, device=run.device,
        load=True,
    )  # fmt: skip
    frames, *grid = run.wan.latent_grid(config.data.frames, *config.data.size)
    read = FeatureRead(teacher, "video", (grid[0], grid[1]))
    train, val = (features(c, n, read, frames) for c, n in zip(splits(run), counts, strict=True))
    return train, val


def splits(run: Run) -> tuple[ClipEncoder, ClipEncoder]:
    return run.clips, run.val_clips


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--val", type=int, default=64)
    options = parser.parse_args()
    run = build_run(load_run(options.recipe, options.overrides))
    counts = options.train, options.val
    z = latents(run.clips, counts[0]), latents(run.val_clips, counts[1])
    print("| teacher | latents told by features | features told by latents |\n|---|---|---|")
    for alias in run.config.teachers:
        found = tokens_of(run, alias, counts)
        print(f"| {alias} | {explained(found, z):.1%} | {explained(z, found):.1%} |", flush=True)


if __name__ == "__main__":
    main()
