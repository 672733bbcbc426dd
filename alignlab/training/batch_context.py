"""What objectives are told of a batch's clips besides tokens.

Shape letters: B batch, E entities, K references, P tokens per reference, N = K*P reference tokens,
T frames, H, W pixels.
"""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from alignlab.kernels.host_copy import to_device
from alignlab.losses.grids import covered_share, patch_tokens
from alignlab.losses.objective import Context, Features, Grid, Objective
from alignlab.training.encoded import FeatureRead


class ClipContents(Protocol):
    """What `alignlab.Alignment` reads of a batch besides the transformer's tokens."""

    @property
    def sigma_B(self) -> Tensor:
        """Noise level of each sample, on the training device; 1 is pure noise."""

    @property
    def step_sigma_S(self) -> Tensor | None:
        """Noise levels of all samples of the step, as a normalized gate reads them."""

    @property
    def latents_BCTHW(self) -> Tensor | None:
        """Clean latents of the videos."""

    @property
    def caption_BLD(self) -> Tensor | None:
        """Embeddings of the full captions."""

    @property
    def names(self) -> list[list[str]]:
        """Of each sample's references, as far as they were kept."""

    @property
    def referenced_B(self) -> Tensor:
        """Which samples keep a reference that shows something, bool on the CPU."""

    @property
    def masks(self) -> list[Tensor | None]:
        """Those of each clip's entities, bool (E, T, H, W) on the CPU."""

    @property
    def undecided(self) -> list[Tensor | None]:
        """Where it is not known what a clip shows, bool (T, H, W) on the CPU; None: nowhere."""

    @property
    def reference_masks(self) -> list[Tensor]:
        """Where the subjects of each sample's references are, bool (K, H, W) on the CPU."""

    def features(self, read: FeatureRead) -> list[Tensor | None]:
        """A teacher's features by sample, on the device; None if its references are dropped."""


class BatchContext:
    """Makes each thing once a batch, for the first objective that reads it.

    Args:
        batch: of a run, or of a loop of one's own.
        reference_grid: (K, H, W) of its reference tokens, or None if nothing reads them.
        patch_HW: of a token of the transformer, in latents.
    """

    def __init__(
        self,
        batch: ClipContents,
        reference_grid: Grid | None = None,
        patch_HW: tuple[int, int] = (1, 1),
    ) -> None:
        self._batch = batch
        self._reference_grid = reference_grid
        self._patch_HW = patch_HW
        self._device = batch.sigma_B.device

    def of(self, objective: Objective) -> Context:
        """What the objective needs."""
        return Context(
            self._batch.caption_BLD if "text" in objective.needs else None,
            self._masks_BTHW if "masks" in objective.needs else None,
            self._foreground_BN if "foreground" in objective.needs else None,
            self._undecided_BTHW if "masks" in objective.needs else None,
        )

    @cached_property
    def latents(self) -> Features:
        """The clean latents on the grid of the video tokens.

        Raises:
            ValueError: they do not divide into patches.
        """
        latents_BCTHW = self._batch.latents_BCTHW
        assert latents_BCTHW is not None  # of every run; `GivenClips.check`
        tokens_BTPD = patch_tokens(latents_BCTHW, self._patch_HW)
        height, width = (
            n // p for n, p in zip(latents_BCTHW.shape[3:], self._patch_HW, strict=True)
        )
        return Features(tokens_BTPD, (tokens_BTPD.shape[1], height, width))

    @cached_property
    def host_ids_BN(self) -> Tensor:
        """Subject of each reference token, on the CPU."""
        return shared_subjects(self._batch.names, self._grid)

    @cached_property
    def ids_BN(self) -> Tensor:
        """Subject of each reference token, on the device."""
        return to_device(self.host_ids_BN, self._device)

    @cached_property
    def has_video_B(self) -> Tensor:
        """Which samples have video tokens: all."""
        return torch.ones_like(self._batch.sigma_B, dtype=torch.bool)

    @cached_property
    def has_references_B(self) -> Tensor:
        """Which samples have reference tokens: references may be dropped."""
        return (self.ids_BN >= 0).any(1)

    @cached_property
    def shows_reference_B(self) -> Tensor:
        """Which samples keep a reference that is not blank."""
        return to_device(self._batch.referenced_B, self._device)

    @property
    def _grid(self) -> Grid:
        assert self._reference_grid is not None  # an objective taps reference tokens
        return self._reference_grid

    @cached_property
    def _masks_BTHW(self) -> Tensor:
        return to_device(torch.stack([_visible(m) for m in self._batch.masks]), self._device)

    @cached_property
    def _undecided_BTHW(self) -> Tensor | None:
        undecided = self._batch.undecided
        if all(undecided_THW is None for undecided_THW in undecided):
            return None
        like = next(one_THW for one_THW in undecided if one_THW is not None)
        filled = [torch.zeros_like(like) if one_THW is None else one_THW for one_THW in undecided]
        return to_device(torch.stack(filled), self._device)

    @cached_property
    def _foreground_BN(self) -> Tensor:
        """On the CPU."""
        count, height, width = self._grid
        shares_BKP = torch.zeros(len(self._batch.names), count, height * width)
        for row, masks_KHW in enumerate(self._batch.reference_masks):
            if len(masks_KHW):
                covered_KP = covered_share(masks_KHW, (len(masks_KHW), height, width))
                shares_BKP[row, : len(masks_KHW)] = covered_KP
        return shares_BKP.flatten(1)


def _visible(masks_ETHW: Tensor | None) -> Tensor:
    """Where any entity is."""
    assert masks_ETHW is not None  # `Alignment.check_data`
    return masks_ETHW.any(0)


def shared_subjects(names: list[list[str]], grid: Grid) -> Tensor:
    """One subject id for all references of the batch with the same name, int64 (B, N) on the CPU.

    A tap numbers references by their slot; two pictures of one subject must not be pushed apart.

    Args:
        names: of each sample's references.
        grid: (K, H, W) with the largest K of the batch; samples with fewer are filled up with -1.
    """
    count, height, width = grid
    distinct = dict.fromkeys(name for sample in names for name in sample)
    numbers = {name: number for number, name in enumerate(distinct)}
    ids_BK = torch.full((len(names), count), -1)
    for row, sample in enumerate(names):
        ids_BK[row, : len(sample)] = torch.tensor([numbers[name] for name in sample])
    return ids_BK.repeat_interleave(height * width, dim=1)
