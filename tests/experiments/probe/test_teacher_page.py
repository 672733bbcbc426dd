"""What the page of `alignlab teachers score` says, and which teachers it calls alike."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.parts import TeacherConfig
from alignlab.evaluation.teacher_pairs import similar_pairs
from alignlab.evaluation.teacher_score import TeacherCost, TeacherScore
from alignlab.experiments.probe.teacher_page import lead
from alignlab.metrics import cka


def scored(alias: str, middle: Tensor, size: tuple[int, int], **changes: Any) -> TeacherScore:
    config = TeacherConfig(family="tiny-dino")
    score = TeacherScore(
        alias, config, (5, *size), {8: 0.5}, 0.1, {}, (0.4, 0.3, 0.2, 0.1), 0.9,
        TeacherCost(0.02, 1.0, None, 0.1), tuple(middle),
    )  # fmt: skip
    return dataclasses.replace(score, **changes)


def tokens(seed: int, count: int = 16, width: int = 6) -> Tensor:
    return torch.randn(3, count, width, generator=torch.Generator().manual_seed(seed))


def test_pairs_are_compared_on_the_coarsest_grid() -> None:
    fine, other = tokens(0), tokens(1, 4)
    coarse = fine.unflatten(1, (4, 4)).unflatten(2, (2, 2)).unflatten(1, (2, 2)).mean((2, 4))
    pairs = similar_pairs(
        [
            scored("fine", fine, (4, 4)),
            scored("coarse", coarse.flatten(1, 2), (2, 2)),
            scored("other", other, (2, 2)),
        ]
    )
    assert list(pairs) == [("fine", "coarse"), ("fine", "other"), ("coarse", "other")]
    assert pairs["fine", "coarse"] == pytest.approx(1, abs=1e-5)
    rows = coarse.reshape(12, 6), other.reshape(12, 6)
    assert pairs["coarse", "other"] == pytest.approx(cka(*rows, unbiased=True), abs=1e-5)


def test_the_page_says_who_tells_clips_apart_who_is_fine_and_which_two_differ() -> None:
    sharp = {"iicr": {8: 0.8}, "frequency": (0.1, 0.1, 0.2, 0.6)}
    quick = {"cost": TeacherCost(0.004, 1.0, None, 0.1), "iicr": {8: 0.8}}
    scores = [
        scored("a", tokens(0), (4, 4)),
        scored("b", tokens(1), (4, 4), **sharp),
        scored("c", tokens(2), (4, 4), **quick),
    ]
    pairs = {("a", "b"): 0.7, ("a", "c"): 0.9, ("b", "c"): 0.2}
    assert lead(scores, pairs) == [
        "Tells clips apart best: b, c (IICR-like 8: 0.800; by guessing 0.100).",
        "Finest over the frame: b (60% of its power in the highest band); coarsest: a (10%).",
        "Least alike, so the first candidates for a fusion: b and c (CKA 0.200).",
        "Quickest: c (4 ms a clip); slowest: a (20 ms).",
    ]
    assert lead(scores[:1], {}) == ["One teacher: name several in the recipe to compare them."]
