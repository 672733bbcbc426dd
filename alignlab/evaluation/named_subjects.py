"""Does a clip show the subjects that its caption names? Attribute by attribute, by the teacher.

Linear probes on the teacher's patch tokens say which shape, colour and texture a patch shows, or
that it is background. A named subject is looked for in the region of its colour, since the colours
of a clip's subjects are distinct. Only for the world of `shapes`, and a teacher that knows it.
Shape letters: N patches of all frames, T frames, P patches of a frame, D width, E entities.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignlab.data.sample import Sample
from alignlab.data.shapes.world import COLORS, MOTIONS, SHAPES, TEXTURES
from alignlab.losses.grids import covered_share
from alignlab.teachers import Teacher

VOCABULARIES = {"color": tuple(COLORS), "texture": TEXTURES, "shape": SHAPES}
ON_SUBJECT = 0.4  # share of a patch that a subject covers, from which on the patch shows it
OFF_SUBJECT = 0.05
RIDGE = 1e-4


class Recognised(NamedTuple):
    """What is recognised of one named subject.

    A colour is if more patches show it than any colour that the caption does not name; texture and
    shape if the patches of that colour, weighted by how surely they are of it, vote for them;
    motion if their centre moves most in the direction that the caption says, from the first to the
    last frame.
    """

    color: bool
    motion: bool
    texture: bool
    shape: bool


class AttributeProbes:
    """Linear classifiers of colour, texture and shape, fitted to a teacher's tokens of real clips.

    Args:
        teacher: knows the world of `shapes`.
        samples: real clips with masks that the probes are fitted to, in closed form as far as
            convexity goes (L-BFGS on a ridge-regularised logistic loss).
        grid_HW: the teacher's patches on a frame.
    """

    def __init__(self, teacher: Teacher, samples: list[Sample], grid_HW: tuple[int, int]) -> None:
        tokens, labels = zip(*(_labelled(teacher, s, grid_HW) for s in samples), strict=True)
        tokens_ND, labels_N3 = torch.cat(tokens), torch.cat(labels)
        self._probes = {
            name: _fit(tokens_ND, labels_N3[:, column], len(VOCABULARIES[name]) + 1)
            for column, name in enumerate(VOCABULARIES)
        }

    @torch.no_grad()
    def recognised(
        self, tokens_TPD: Tensor, grid_HW: tuple[int, int], sample: Sample
    ) -> list[Recognised]:
        """What a clip shows of each subject that the sample names.

        Args:
            tokens_TPD: the teacher's, of the clip.
            grid_HW: their places.
            sample: names the subjects and says where they move.
        """
        tokens_ND = tokens_TPD.flatten(0, 1)
        # the last class is background
        log_p = {k: p(tokens_ND).log_softmax(1)[:, :-1] for k, p in self._probes.items()}
        named = [dict(zip(VOCABULARIES, p.split(), strict=True)) for p in sample.entities]
        colors = VOCABULARIES["color"]
        unnamed = [i for i, c in enumerate(colors) if c not in {n["color"] for n in named}]
        shown = log_p["color"].exp()
        subjects = []
        for subject, phrase in zip(named, sample.entities, strict=True):
            weight_N1 = shown[:, colors.index(subject["color"]), None]
            moves = _direction(weight_N1.view(-1, *grid_HW))
            votes = {
                name: VOCABULARIES[name][int((weight_N1 * log_p[name]).sum(0).argmax())]
                for name in ("texture", "shape")
            }
            subjects.append(
                Recognised(
                    color=bool(weight_N1.sum() > shown[:, unnamed].sum(0).max()),
                    motion=f"{phrase} moves {moves}" in sample.caption,
                    texture=votes["texture"] == subject["texture"],
                    shape=votes["shape"] == subject["shape"],
                )
            )
        return subjects


def _labelled(teacher: Teacher, sample: Sample, grid_HW: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Patch tokens and labels of three frames, patches on a subject's edge left out."""
    assert sample.masks_ETHW is not None  # shapes always has masks
    tokens_TPD = teacher.encode(sample.video_THWC[None], grid_HW).tokens_BTPD[0]
    tokens, labels = [], []
    for t in (0, len(tokens_TPD) // 2, len(tokens_TPD) - 1):
        masks_EHW = sample.masks_ETHW[:, t]
        covered_EP = covered_share(masks_EHW, (len(masks_EHW), *grid_HW))
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


def _direction(weight_THW: Tensor) -> str:
    """The direction in which the weights' centre moves most, as captions call it."""
    weight_THW = weight_THW[[0, -1]]
    weight_THW = weight_THW / weight_THW.sum((1, 2), keepdim=True)
    down, right = (torch.arange(side, dtype=weight_THW.dtype) for side in weight_THW.shape[1:])
    dx = (weight_THW.sum(1) @ right).diff()
    dy = (weight_THW.sum(2) @ down).diff()
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
