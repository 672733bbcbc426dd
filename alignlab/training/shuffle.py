"""Shuffled teachers (`teachers.<alias>.shuffle`): a negative control with the same statistics.

An objective gets the features of another train clip, at other places. Which clip and which places
is fixed by the number of clips and the clip's index, so that it is the same in every step, run and
seed, and needs no neighbour in a batch. The dataset cache keeps features as they are.
Shape letters: T frames, P tokens per frame, K references, D width.
"""

from functools import lru_cache

import torch
from torch import Tensor

from alignlab.data.sample import ClipDataset
from alignlab.errors import UserError
from alignlab.randomness import generator

SHUFFLE_SEED = 0
"""Of both permutations, whatever the run's seed."""


def other_clip(index: int, count: int) -> int:
    """The clip whose features a clip gets: the next one in a random round of all `count` clips.

    Every clip is the source of one other, and none of itself, if there are two or more.
    """
    return _successors(count)[index]


def clip_with_references(dataset: ClipDataset, index: int) -> int:
    """`other_clip` among the clips of a data set that have references.

    Raises:
        UserError: no other one has.
    """
    other = other_clip(index, len(dataset))
    while not dataset.names(other) and other != index:
        other = other_clip(other, len(dataset))
    if other == index:
        raise UserError("teachers shuffle: no other train clip has a reference")
    return other


def shuffled_video(rows_TPD: Tensor, index: int) -> Tensor:
    """Tokens of a clip at other places and in other frames.

    Args:
        rows_TPD: features of `other_clip`.
        index: of the clip that gets them; each has a permutation of its own.
    """
    rows_ND = rows_TPD.flatten(0, 1)
    return rows_ND[_order(len(rows_ND), index, rows_ND.device)].reshape(rows_TPD.shape)


def shuffled_references(rows_KPD: Tensor, index: int, count: int) -> Tensor:
    """Tokens of reference images at other places of their image.

    Args:
        rows_KPD: features of the references of `clip_with_references`.
        index: of the clip that gets them.
        count: how many references it has. Where the other has fewer, they are taken again from the
            first on; where it has more, the last are left out.
    """
    picked = torch.arange(count, device=rows_KPD.device) % len(rows_KPD)
    return rows_KPD[picked][:, _order(rows_KPD.shape[1], index, rows_KPD.device)]


def check_shuffled(alias: str, dataset: ClipDataset, *, references: bool) -> None:
    """Refuses data in which no other clip has features to give.

    Args:
        alias: of the teacher.
        dataset: the train clips.
        references: whether features of references are read.

    Raises:
        UserError: there is one clip, or one with references.
    """
    count, what = len(dataset), "train clips"
    if references:
        count = round(count * dataset.share_with_references())
        what = "train clips with references"
    if count < 2:
        raise UserError(f"teachers.{alias}.shuffle: needs two {what} or more, not {count}")


def shuffle_note(alias: str) -> str:
    """What is said of a shuffled teacher, in the log and in the result."""
    return (
        f"teachers.{alias} is shuffled: a negative control, whose objectives get the features of "
        "other clips at other places"
    )


def _order(count: int, index: int, device: torch.device) -> Tensor:
    order = torch.randperm(count, generator=generator(SHUFFLE_SEED, "shuffle-tokens", index))
    return order.to(device)


@lru_cache(maxsize=4)
def _successors(count: int) -> list[int]:
    round_N = torch.randperm(count, generator=generator(SHUFFLE_SEED, "shuffle-clips"))
    successors_N = torch.empty_like(round_N)
    successors_N[round_N] = round_N.roll(-1)
    found: list[int] = successors_N.tolist()
    return found
