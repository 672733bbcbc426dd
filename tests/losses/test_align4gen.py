"""Align4Gen: what the fused target is, both normalisations against loops, teachers' own grids."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab.losses import build_objective
from alignlab.losses.align4gen import (
    Align4Gen,
    Align4GenConfig,
    Normalization,
    fuse_features,
    fused_alignment_loss,
)
from alignlab.losses.grids import match_grid
from alignlab.losses.objective import Features, Tokens
from alignlab.losses.repa import repa_loss
from random_tensors import draw, golden_pair

SINE, COSINE = golden_pair(1, 6, 4)
GRID = (3, 2, 2)


def build(**settings: Any) -> Align4Gen:
    config = {"teacher": ("dino", "sam"), "blocks": (0,), "projector_dim": 8, **settings}
    objective = build_objective(
        Align4GenConfig(**config), student_dim=6, teacher_dims={"dino": 5, "sam": 3}
    )
    assert isinstance(objective, Align4Gen)
    return objective


def length(vector: list[Tensor]) -> Tensor:
    return torch.stack(vector).square().sum().sqrt()


def by_loops(student: Tensor, teachers: list[Tensor], joint: bool) -> Tensor:
    """One sample (N, D): every token, teacher and channel."""
    total = student.new_zeros(())
    for n in range(len(student)):
        whole = length(list(student[n]))
        start = 0
        for teacher in teachers:
            width = teacher.shape[1]
            share = list(student[n, start : start + width])
            dot = student.new_zeros(())
            for d in range(width):
                dot = dot + share[d] * teacher[n, d] / length(list(teacher[n]))
            if joint:
                total = total + dot / whole / math.sqrt(len(teachers))
            else:
                total = total + dot / length(share) / len(teachers)
            start += width
    return -total / len(student)


@pytest.mark.parametrize("normalization", ["joint", "per_teacher"])
def test_one_teacher_gives_the_golden_value_of_repa(normalization: Normalization) -> None:
    loss_B = fused_alignment_loss(SINE, [COSINE], normalization=normalization)
    assert loss_B.shape == (1,)
    assert loss_B.item() == pytest.approx(-0.00094802, abs=5e-9)


@pytest.mark.parametrize("normalization", ["joint", "per_teacher"])
@pytest.mark.parametrize("widths", [(5, 3), (1, 7, 2)])
def test_agrees_with_loops_in_value_and_gradient(
    widths: tuple[int, ...], normalization: Normalization
) -> None:
    student = draw(2, 7, sum(widths)).double().requires_grad_()
    teachers = [10**i * draw(2, 7, width, seed=i + 1).double() for i, width in enumerate(widths)]
    ours = fused_alignment_loss(student, teachers, normalization=normalization)
    loops = torch.stack(
        [by_loops(student[b], [t[b] for t in teachers], normalization == "joint") for b in range(2)]
    )
    torch.testing.assert_close(ours, loops)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(loops.sum(), student)
    )


def test_the_fused_target_is_of_unit_length_with_equal_shares() -> None:
    teachers = [draw(2, 7, 5), 100 * draw(2, 7, 3, seed=1), draw(2, 7, 4, seed=2)]
    fused = fuse_features(teachers)
    assert fused.shape == (2, 7, 12)
    torch.testing.assert_close(fused.norm(dim=-1), torch.ones(2, 7))
    for share in fused.split([5, 3, 4], dim=-1):
        torch.testing.assert_close(share.norm(dim=-1), torch.full((2, 7), 3**-0.5))
    assert fused_alignment_loss(fused, teachers).tolist() == pytest.approx([-1, -1])
    assert fuse_features([draw(1, 2, 3).bfloat16()]).dtype == torch.float32
    assert fuse_features([draw(1, 2, 3).double(), draw(1, 2, 3)]).dtype == torch.float64


def test_only_joint_normalisation_lets_the_student_trade_teachers() -> None:
    teachers = [draw(1, 4, 5), draw(1, 4, 3, seed=1)]
    fused = fuse_features(teachers)
    lopsided = fused * torch.tensor([10.0] * 5 + [0.1] * 3)
    per_teacher = fused_alignment_loss(lopsided, teachers, normalization="per_teacher")
    assert per_teacher.item() == pytest.approx(-1)
    assert fused_alignment_loss(lopsided, teachers).item() > -0.75
    one_only = torch.cat([fused[..., :5], torch.zeros(1, 4, 3)], -1)
    assert fused_alignment_loss(one_only, teachers).item() == pytest.approx(-(2**-0.5))
    half = fused_alignment_loss(one_only, teachers, normalization="per_teacher")
    assert half.item() == pytest.approx(-0.5)


def test_per_teacher_is_the_mean_of_repa_losses() -> None:
    student, teachers = draw(2, 7, 8), [draw(2, 7, 5, seed=1), draw(2, 7, 3, seed=2)]
    expected = (
        repa_loss(student[..., :5], teachers[0]) + repa_loss(student[..., 5:], teachers[1])
    ) / 2
    ours = fused_alignment_loss(student, teachers, normalization="per_teacher")
    torch.testing.assert_close(ours, expected)


def test_no_gradient_reaches_a_teacher() -> None:
    student = draw(1, 4, 8).requires_grad_()
    teachers = [draw(1, 4, 5, seed=1).requires_grad_(), draw(1, 4, 3, seed=2).requires_grad_()]
    for normalization in ("joint", "per_teacher"):
        loss_B = fused_alignment_loss(student, teachers, normalization=normalization)
        torch.autograd.backward(loss_B.sum())
    assert student.grad is not None and all(teacher.grad is None for teacher in teachers)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="share batch and tokens"):
        fuse_features([draw(1, 4, 5), draw(1, 3, 5)])
    with pytest.raises(ValueError, match="share batch and tokens"):
        fuse_features([])
    with pytest.raises(ValueError, match=r"student width 7 is not the sum of \[5, 3\]"):
        fused_alignment_loss(draw(1, 4, 7), [draw(1, 4, 5), draw(1, 4, 3)])


@pytest.mark.parametrize("normalization", ["joint", "per_teacher"])
def test_each_teacher_comes_from_its_own_grid(normalization: Normalization) -> None:
    objective = build(blocks=(0, 2), normalization=normalization)
    student = {block: Tokens(draw(2, 12, 6, seed=block), GRID) for block in (0, 2)}
    dino = Features(draw(2, 9, 4, 5, seed=7), (9, 2, 2))
    sam = Features(draw(2, 5, 16, 3, seed=8), (5, 4, 4))
    terms = objective(student, {"dino": dino, "sam": sam})
    targets = [match_grid(x.tokens_BTPD, x.grid, GRID).flatten(1, 2) for x in (dino, sam)]
    losses = [
        fused_alignment_loss(
            objective.projectors[f"block_{block}"](student[block].tokens_BND),
            targets,
            normalization=normalization,
        )
        for block in (0, 2)
    ]
    torch.testing.assert_close(terms.loss_B, (losses[0] + losses[1]) / 2)
    torch.testing.assert_close(terms.similarity_B, -terms.loss_B)


def test_a_first_frame_that_one_teacher_left_out_is_compared_with_none() -> None:
    objective = build()
    tokens_BND = draw(2, 12, 6)
    teacher = {
        "dino": Features(draw(2, 9, 4, 5, seed=1), (9, 2, 2)),
        "sam": Features(draw(2, 8, 4, 3, seed=2), (8, 2, 2)),
    }
    terms = objective({0: Tokens(tokens_BND, GRID)}, teacher)
    projected = objective.projectors["block_0"](tokens_BND)[:, 4:]
    images = teacher["dino"].tokens_BTPD[:, 1:].unflatten(1, (2, 4)).mean(2)
    clips = teacher["sam"].tokens_BTPD.unflatten(1, (2, 4)).mean(2)
    expected = fused_alignment_loss(projected, [images.flatten(1, 2), clips.flatten(1, 2)])
    torch.testing.assert_close(terms.loss_B, expected)


def test_defaults_and_one_projector_to_the_summed_width() -> None:
    config = Align4GenConfig(teacher=("dino", "sam"))
    assert (config.weight, config.blocks) == (0.5, (7,))
    assert (config.normalization, config.projector_dim) == ("joint", 2048)
    objective = build_objective(config, student_dim=24, teacher_dims={"dino": 12, "sam": 7})
    shapes = [tuple(m.weight.shape) for m in objective.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(2048, 24), (2048, 2048), (19, 2048)]
    alone = build(teacher="dino")
    assert [p.shape[0] for p in alone.parameters()][-1] == 5
