"""Stage 1 of SARA: the saliency aligner learns where the entities of a clip are.

Each clip is asked about once per entity, once for all of them and once for the background.
Shape letters: B forwards, K forwards of one clip, T frames, P tokens per frame, L text tokens,
D width of the teacher.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from alignlab.data.sample import ClipDataset
from alignlab.errors import UserError
from alignlab.kernels.host_copy import to_device
from alignlab.losses.grids import pool_masks, share_is_decided
from alignlab.losses.sara import info_nce
from alignlab.losses.stage1.saliency_aligner import (
    SaliencyAligner,
    SaliencyAlignerConfig,
    saliency_bce,
)
from alignlab.randomness import derive_seed
from alignlab.stage1.task import FrozenModels, Stage1Settings, Stage1Task
from alignlab.training.encoded import ClipPixels

THRESHOLD = 0.5  # of the area under a mask that makes a token a target, and of saliency for IoU


@dataclass(frozen=True)
class SaraClip:
    """A clip with its forwards: the entities, all of them, and the background if it is asked for.

    Args:
        features_TPD: the teacher's tokens.
        texts: one per forward.
        texts_KLD: their embeddings.
        targets_KTP: 1 on the tokens that each text names, else 0.
        entities: how many of the forwards are single entities; they come first.
        caption: the full caption, which Stage 2 asks about.
        counted_KTP: bool, tokens whose target is known; None if all are.
    """

    features_TPD: Tensor
    texts: tuple[str, ...]
    texts_KLD: Tensor
    targets_KTP: Tensor
    entities: int
    caption: str
    counted_KTP: Tensor | None = None


class SaraStage1(Stage1Settings):
    """SARA's saliency aligner (losses/stage1/saliency_aligner.py)."""

    kind: Literal["sara"]
    depth_cross: int = Field(default=2, ge=1)
    """Blocks in which visual tokens attend to the text. SARA's."""
    depth_self: int = Field(default=4, ge=0)
    """Blocks in which visual tokens attend to each other. SARA's."""
    heads: int = Field(default=8, ge=1)
    """Attention heads; divides the teacher's width. SARA's."""
    hidden: int = Field(default=512, ge=1)
    """Hidden width of the saliency head. SARA's."""
    embed_dim: int = Field(default=512, ge=1)
    """Width of the space in which clips and texts are compared. Ours."""
    attention: Literal["clip", "frame"] = "clip"
    """What self-attention sees: the tokens of the clip, or of one frame (T times cheaper)."""
    background: str | None = "background"
    """Text whose target is everything outside the entities; null: no such forward. Ours: SARA has
    a caption of the scene without its entities, which data sets here do not have."""
    nce_weight: float = Field(default=1.0, ge=0)
    """Weight of InfoNCE beside the masks' cross-entropy. SARA's: 1."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of InfoNCE. SARA's."""


@final
class SaraTask(Stage1Task[SaraClip]):
    """Cross-entropy against masks plus InfoNCE from clip to text."""

    Settings: ClassVar[type[Stage1Settings]] = SaraStage1
    reads_text: ClassVar[bool] = True
    network: SaliencyAligner

    def __init__(self, settings: Stage1Settings, models: FrozenModels, *, seed: int) -> None:
        assert isinstance(settings, SaraStage1) and models.text is not None
        self._settings, self._models = settings, models
        teacher_dim = models.teacher.dim
        if teacher_dim % settings.heads:
            raise UserError(
                f"stage1.heads: {settings.heads} does not divide the teacher's width, {teacher_dim}"
            )
        self.shape = SaliencyAlignerConfig(
            teacher_dim=teacher_dim,
            text_dim=models.text.dim,
            depth_cross=settings.depth_cross,
            depth_self=settings.depth_self,
            heads=settings.heads,
            hidden=settings.hidden,
            embed_dim=settings.embed_dim,
            attention=settings.attention,
        )
        network = SaliencyAligner(self.shape, seed=derive_seed(seed, "stage1-sara"))
        self.network = network.to(models.device)

    @classmethod
    def check_data(cls, *datasets: ClipDataset) -> None:
        for dataset in datasets:
            key = dataset.without_masks()
            if key is not None:
                raise UserError(
                    f"{key}: has no entity masks, which SARA's Stage 1 learns from; add `masks` "
                    "and `entities` to the data set's metadata (docs/data.md)"
                )

    @classmethod
    def texts(
        cls, settings: Stage1Settings, dataset: ClipDataset, index: int, *, measured: bool
    ) -> tuple[str, ...]:
        assert isinstance(settings, SaraStage1)
        asked = _asked(dataset.entities(index), settings.background)
        return (*asked, dataset.caption(index)) if measured else asked

    def encode(self, pixels: ClipPixels) -> SaraClip:
        """Teacher tokens, text embeddings and targets of one clip."""
        sample = pixels.sample
        assert sample.masks_ETHW is not None and sample.entities  # `check_data`
        features = self._models.features(pixels)
        union_1THW = sample.masks_ETHW.any(0, keepdim=True)
        texts = _asked(sample.entities, self._settings.background)
        masks = [sample.masks_ETHW, union_1THW]
        undecided_THW = sample.undecided_THW
        if self._settings.background is not None:
            masks.append(~union_1THW if undecided_THW is None else ~union_1THW & ~undecided_THW)
        shares_KTP = pool_masks(torch.cat(masks), features.grid)
        targets_KTP = shares_KTP > THRESHOLD
        counted_KTP = None
        if undecided_THW is not None:
            undecided_1TP = pool_masks(undecided_THW[None], features.grid)
            counted_KTP = share_is_decided(shares_KTP, undecided_1TP, THRESHOLD)
        return SaraClip(
            features.tokens_BTPD[0],
            texts,
            self._models.embed(texts),
            targets_KTP.float(),
            len(sample.entities),
            sample.caption,
            counted_KTP,
        )

    def loss(self, clips: Sequence[SaraClip]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over forwards, plus InfoNCE over those with different texts.

        Two forwards with the same text (the background of two clips) are no negatives of each
        other, so only the first of them is in InfoNCE. Tokens with an undecided target are in no
        cross-entropy, and neither are forwards that have no others.
        """
        features_BTPD = torch.cat([c.features_TPD.expand(len(c.texts), -1, -1, -1) for c in clips])
        texts_BLD = to_device(torch.cat([c.texts_KLD for c in clips]), self._models.device)
        targets_BTP = to_device(torch.cat([c.targets_KTP for c in clips]), self._models.device)
        output = self.network(to_device(features_BTPD, self._models.device), texts_BLD)
        counted_BTP = _counted(clips)
        if counted_BTP is None:
            bce = saliency_bce(output.logits_BTP, targets_BTP).mean()
        else:
            some_B = counted_BTP.flatten(1).any(1)
            counted_BTP = to_device(counted_BTP, self._models.device)
            bce_B = saliency_bce(output.logits_BTP, targets_BTP, counted_BTP)
            bce = bce_B.sum() / max(1, int(some_B.sum()))
        visual_BE, text_BE = self.network.embed(output, texts_BLD)
        first = _first_of_each([text for clip in clips for text in clip.texts])
        nce = info_nce(visual_BE[first], text_BE[first], self._settings.temperature).mean()
        total = bce + self._settings.nce_weight * nce
        terms = {"loss/total": total, "loss/bce": bce, "loss/info_nce": nce}
        return total, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def evaluate(self, clips: Iterable[SaraClip]) -> dict[str, float]:
        """Intersection over union of saliency above 0.5 with the masks, mean over forwards.

        `val/iou` is over entity phrases, `val/iou_union` what they would get from a network that
        marks all entities whatever the phrase, `val/iou_foreground` and `val/iou_background` are
        over the other forwards, and `val/iou_caption` compares what the full caption marks with
        all entities: Stage 2 asks so, and no caption is in training. Tokens with an undecided
        target are left out.
        """
        per_clip: dict[str, list[Tensor]] = {}
        for clip in clips:
            texts_BLD = torch.cat([clip.texts_KLD, self._models.embed([clip.caption])])
            features_BTPD = clip.features_TPD.expand(len(texts_BLD), -1, -1, -1)
            logits_BTP = self.network(
                features_BTPD.to(self._models.device), texts_BLD.to(self._models.device)
            ).logits_BTP.cpu()
            for name, values in _measured(clip, logits_BTP).items():
                per_clip.setdefault(name, []).append(values)
        joined = {name: torch.cat(values) for name, values in per_clip.items()}
        return {name: float(values.mean()) for name, values in joined.items() if len(values)}


def _asked(entities: Sequence[str], background: str | None) -> tuple[str, ...]:
    """One text per forward: the entities, all of them, and the background if it is asked for."""
    texts = (*entities, ", ".join(entities))
    return texts if background is None else (*texts, background)


def _counted(clips: Sequence[SaraClip]) -> Tensor | None:
    """Tokens of all forwards whose targets are known, on the CPU; None if all are."""
    if all(clip.counted_KTP is None for clip in clips):
        return None
    return torch.cat(
        [
            torch.ones_like(clip.targets_KTP, dtype=torch.bool)
            if clip.counted_KTP is None
            else clip.counted_KTP
            for clip in clips
        ]
    )


def _measured(clip: SaraClip, logits_BTP: Tensor) -> dict[str, Tensor]:
    """Values of a clip's forwards by metric; the last logits are those of its full caption."""
    targets_BTP, counted_BTP, n = clip.targets_KTP, clip.counted_KTP, clip.entities
    marked_BTP = logits_BTP.sigmoid() > THRESHOLD
    rows = {  # which forwards are compared, and what is marked there
        "val/iou": (slice(0, n), marked_BTP[:n]),
        "val/iou_union": (slice(0, n), targets_BTP[n, None].expand(n, -1, -1)),
        "val/iou_foreground": (slice(n, n + 1), marked_BTP[n, None]),
        "val/iou_background": (slice(n + 1, None), marked_BTP[n + 1 : -1]),
        "val/iou_caption": (slice(n, n + 1), marked_BTP[-1, None]),
    }
    values = {
        name: mask_iou(marked, targets_BTP[of], None if counted_BTP is None else counted_BTP[of])
        for name, (of, marked) in rows.items()
    }
    bce_B = saliency_bce(logits_BTP[:-1], targets_BTP, counted_BTP)
    if counted_BTP is None:
        return values | {"val/bce": bce_B}
    some_B = counted_BTP.flatten(1).any(1)
    kept = {name: values[name][some_B[of]] for name, (of, _) in rows.items()}
    return kept | {"val/bce": bce_B[some_B]}


def mask_iou(marked_BTP: Tensor, target_BTP: Tensor, counted_BTP: Tensor | None = None) -> Tensor:
    """Intersection over union of each row's tokens, (B,); 1 where both are empty.

    Args:
        marked_BTP: what is compared.
        target_BTP: what it is compared with.
        counted_BTP: bool, tokens that are compared; None: all.
    """
    marked_BN, target_BN = marked_BTP.bool().flatten(1), target_BTP.bool().flatten(1)
    if counted_BTP is not None:
        marked_BN, target_BN = (x & counted_BTP.flatten(1) for x in (marked_BN, target_BN))
    both_B, either_B = (marked_BN & target_BN).sum(1), (marked_BN | target_BN).sum(1)
    return torch.where(either_B > 0, both_B / either_B.clamp(min=1), 1.0)


def _first_of_each(texts: Sequence[str]) -> list[int]:
    return [i for i, text in enumerate(texts) if text not in texts[:i]]
