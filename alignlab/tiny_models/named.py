"""Does a clip show the subjects that its caption names? Attribute by attribute, by the teacher.

Linear probes on the teacher's patch tokens say which shape, colour and texture a patch shows, or
that it is background. A named subject is looked for in the region of its colour, since the colours
of a clip's subjects are distinct. Shape letters: N patches of all frames, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignlab.data.sample import Sample
from alignlab.data.shapes.world import COLORS, MOTIONS, SHAPES, TEXTURES
from alignlab.teachers import Teacher
from alignlab.tiny_models.clips import SIZE
from alignlab.tiny_models.dino import coverage

VOCABULARIES = {"color": tuple(COLORS), "texture": TEXTURES, "shape": SHAPES}
ON_SUBJECT = 0.4  # share of a patch that a subject covers, from which on the patch shows it
OFF_SUBJECT = 0.05
RIDGE = 1e-4


@dataclass(frozen=True)
class Recognised:
    """Share of named subjects, 0..1. Guessing gives about 1/8, 1/4, 1/4, 1/6 and 1/768."""

    color: float
    motion: float
    texture: float
    shape: float
    all: float


class NamedSubjects:
    """The measure, fitted to real clips.

    A subject's colour counts as recognised if more patches show it than any colour that the
    caption does not name; texture and shape if the patches of that colour, weighted by how surely
    they are of it, vote for them; motion if their centre moves most in the direction that the
    caption says, from the first to the last frame. `all` asks for the four together.

    Args:
        teacher: knows the shapes world; features of `SIZE` frames.
        samples: real clips with masks that the probes are fitted to, in closed form as far as
            convexity goes (L-BFGS on a ridge-regularised logistic loss).
    """

    def __init__(self, teacher: Teacher, samples: list[Sample]) -> None:
        self._teacher = teacher
        tokens, labels = zip(*(self._labelled(s) for s in samples), strict=True)
        tokens_ND, labels_N3 = torch.cat(tokens), torch.cat(labels)
        self._probes = {
            name: _fit(tokens_ND, labels_N3[:, column], len(VOCABULARIES[name]) + 1)
            for column, name in enumerate(VOCABULARIES)
        }

    @torch.no_grad()
    def recognised(self, clips: list[Tensor], samples: list[Sample]) -> Recognised:
        """How many of the subjects that the samples name do the uint8 clips `(T, H, W, C)` show."""
        rows = [row for clip, s in zip(clips, samples, strict=True) for row in self._found(clip, s)]
        table = torch.tensor(rows, dtype=torch.float64)
        color, motion, texture, shape = table.mean(0).tolist()
        return Recognised(color, motion, texture, shape, all=float(table.all(1).double().mean()))

    def _found(self, clip_THWC: Tensor, sample: Sample) -> list[list[bool]]:
        """Per named subject: colour, motion, texture, shape."""
        tokens_TPD = self._tokens(clip_THWC)
        tokens_ND = tokens_TPD.flatten(0, 1)
        # the last class is background
        log_p = {k: p(tokens_ND).log_softmax(1)[:, :-1] for k, p in self._probes.items()}
        named = [dict(zip(VOCABULARIES, p.split(), strict=True)) for p in sample.entities]
        colors = VOCABULARIES["color"]
        unnamed = [i for i, c in enumerate(colors) if c not in {n["color"] for n in named}]
        shown = log_p["color"].exp()
        rows = []
        for subject, phrase in zip(named, sample.entities, strict=True):
            weight_N1 = shown[:, colors.index(subject["color"]), None]
            right = [bool(weight_N1.sum() > shown[:, unnamed].sum(0).max())]
            moves = _direction(weight_N1.view(tokens_TPD.shape[:2]))
            right.append(f"{phrase} moves {moves}" in sample.caption)
            for name in ("texture", "shape"):
                vote = int((weight_N1 * log_p[name]).sum(0).argmax())
                right.append(VOCABULARIES[name][vote] == subject[name])
            rows.append(right)
        return rows

    def _labelled(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Patch tokens and labels of three frames, patches on a subject's edge left out."""
        assert sample.masks_ETHW is not None  # shapes always has masks
        tokens_TPD = self._tokens(sample.video_THWC)
        tokens, labels = [], []
        for t in (0, len(tokens_TPD) // 2, len(tokens_TPD) - 1):
            covered_EP = torch.stack([coverage(mask) for mask in sample.masks_ETHW[:, t]])
            for patch, token in enumerate(tokens_TPD[t]):
                entity = int(covered_EP[:, patch].argmax())
                if covered_EP[entity, patch] > ON_SUBJECT:
                    words = zip(VOCABULARIES.values(), sample.entities[entity].split(), strict=True)
                    labels.append([vocabulary.index(word) for vocabulary, word in words])
                elif covered_EP[:, patch].sum() < OFF_SUBJECT:
                    labels.append([len(vocabulary) for vocabulary in VOCABULARIES.values()])
                else:
                    continue
                tokens.append(token)
        return torch.stack(tokens), torch.tensor(labels)

    def _tokens(self, clip_THWC: Tensor) -> Tensor:
        grid = (SIZE[0] // self._teacher.patch_size, SIZE[1] // self._teacher.patch_size)
        return self._teacher.encode(clip_THWC[None], grid).tokens_BTPD[0]


def _direction(weight_TP: Tensor) -> str:
    """The direction in which the weights' centre moves most, as captions call it."""
    side = math.isqrt(weight_TP.shape[1])
    along = torch.arange(side, dtype=weight_TP.dtype)
    weight_THW = weight_TP[[0, -1]].view(2, side, side)
    weight_THW = weight_THW / weight_THW.sum((1, 2), keepdim=True)
    dx = (weight_THW.sum(1) @ along).diff()
    dy = (weight_THW.sum(2) @ along).diff()
    return max(MOTIONS, key=lambda name: float(dx * MOTIONS[name][0] + dy * MOTIONS[name][1]))


def _fit(tokens_ND: Tensor, labels_N: Tensor, classes: int) -> nn.Linear:
    probe = nn.Linear(tokens_ND.shape[1], classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(tokens_ND), labels_N) + RIDGE * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe.requires_grad_(False)
