"""iREPA: golden value, a reference written with loops, its projector, frames by themselves."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab.losses import build_objective
from alignlab.losses.irepa import IRepa, IRepaConfig, irepa_loss
from alignlab.losses.objective import Features, Tokens
from alignlab.losses.projector import irepa_projector, project_frames, repa_projector
from alignlab.losses.repa import repa_loss
from random_tensors import draw, golden_pair

SINE, COSINE = golden_pair(1, 1, 6, 4)
GRID = (3, 2, 4)


def build(**settings: Any) -> IRepa:
    config = IRepaConfig(**{"teacher": "dino", "blocks": (0,), **settings})
    objective = build_objective(config, student_dim=6, teacher_dims={"dino": 5, "clip": 7})
    assert isinstance(objective, IRepa)
    return objective


def by_loops(student: Tensor, teacher: Tensor, gamma: float) -> Tensor:
    """One sample (T, P, D): every mean, deviation and cosine spelled out."""
    frames, tokens, width = teacher.shape
    total = student.new_zeros(())
    for t in range(frames):
        target = [[0.0] * width for _ in range(tokens)]
        for d in range(width):
            column = [float(teacher[t, p, d]) for p in range(tokens)]
            mean = sum(column) / tokens
            deviation = math.sqrt(sum((y - mean) ** 2 for y in column) / (tokens - 1))
            for p in range(tokens):
                target[p][d] = (column[p] - gamma * mean) / (deviation + 1e-6)
        for p in range(tokens):
            dot = sum(student[t, p, d] * target[p][d] for d in range(width))
            length = math.sqrt(sum(y * y for y in target[p]))
            total = total - dot / (student[t, p].square().sum().sqrt() * length)
    return total / (frames * tokens)


def test_reproduces_its_golden_value() -> None:
    loss_B = irepa_loss(SINE, COSINE)
    assert loss_B.shape == (1,)
    assert loss_B.item() == pytest.approx(-0.00177990, abs=5e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_agrees_with_loops_in_value_and_gradient(gamma: float) -> None:
    student = draw(2, 3, 7, 5).double().requires_grad_()
    teacher = draw(2, 3, 7, 5, seed=1).double() * 3 + 2
    ours = irepa_loss(student, teacher, gamma=gamma)
    loops = torch.stack([by_loops(student[b], teacher[b], gamma) for b in range(2)])
    torch.testing.assert_close(ours, loops)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(loops.sum(), student)
    )


def test_what_all_tokens_of_a_frame_share_is_taken_away() -> None:
    student, teacher = draw(2, 3, 8, 5), draw(2, 3, 8, 5, seed=1)
    shared = 10 * draw(2, 3, 1, 5, seed=2)
    alike = irepa_loss(student, teacher + shared, gamma=1.0)
    torch.testing.assert_close(alike, irepa_loss(student, teacher, gamma=1.0), atol=1e-5, rtol=0)
    plain = repa_loss(student.flatten(1, 2), (teacher + shared).flatten(1, 2))
    assert (plain - repa_loss(student.flatten(1, 2), teacher.flatten(1, 2))).abs().min() > 1e-3


def test_no_gradient_reaches_the_teacher_and_one_token_is_refused() -> None:
    student, teacher = draw(1, 2, 4, 3).requires_grad_(), draw(1, 2, 4, 3, seed=1).requires_grad_()
    torch.autograd.backward(irepa_loss(student, teacher).sum())
    assert student.grad is not None and teacher.grad is None
    with pytest.raises(ValueError, match="at least 2 tokens"):
        irepa_loss(student[:, :, :1], teacher[:, :, :1])


def test_the_projector_is_torchs_convolution_on_each_frames_grid() -> None:
    ours = irepa_projector(6, 5, torch.Generator().manual_seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = nn.Conv2d(6, 5, 3, padding=1)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.bias is not None and theirs.bias is not None
    assert torch.equal(ours.bias, theirs.bias)
    tokens_BND = draw(2, 24, 6)
    projected_BND = project_frames(ours, tokens_BND, GRID)
    assert projected_BND.shape == (2, 24, 5)
    padded = torch.zeros(2, 3, 4, 6, 6)
    padded[:, :, 1:-1, 1:-1] = tokens_BND.view(2, 3, 2, 4, 6)
    for frame, row, column in ((0, 0, 0), (1, 1, 2), (2, 0, 3)):
        window = padded[:, frame, row : row + 3, column : column + 3]
        expected = torch.einsum("byxd,odyx->bo", window, theirs.weight) + theirs.bias
        place = frame * 8 + row * 4 + column
        torch.testing.assert_close(projected_BND[:, place], expected, atol=1e-5, rtol=1e-5)


def test_several_blocks_and_teachers_are_averaged() -> None:
    objective = build(blocks=(0, 4), teacher=("dino", "clip"), gamma=0.8)
    student = {block: Tokens(draw(2, 24, 6, seed=block), GRID) for block in (0, 4)}
    teacher = {
        "dino": Features(draw(2, 3, 8, 5, seed=7), GRID),
        "clip": Features(draw(2, 3, 8, 7, seed=8), GRID),
    }
    terms = objective(student, teacher)
    pairs = []
    for block in (0, 4):
        for number, alias in enumerate(("dino", "clip")):
            conv = objective.projectors[f"block_{block}_teacher_{number}"]
            assert isinstance(conv, nn.Conv2d)
            projected = project_frames(conv, student[block].tokens_BND, GRID)
            target = teacher[alias].tokens_BTPD
            pairs.append(irepa_loss(projected.view(target.shape), target, gamma=0.8))
    torch.testing.assert_close(terms.loss_B, torch.stack(pairs).mean(0))
    torch.testing.assert_close(terms.similarity_B, -terms.loss_B)


def test_the_teacher_is_z_scored_on_the_students_frames() -> None:
    objective = build()
    student = {0: Tokens(draw(2, 24, 6), GRID)}
    frames_BTPD = draw(2, 9, 8, 5, seed=1)
    averaged = torch.stack(
        [frames_BTPD[:, 0], frames_BTPD[:, 1:5].mean(1), frames_BTPD[:, 5:].mean(1)], 1
    )
    long = objective(student, {"dino": Features(frames_BTPD, (9, 2, 4))})
    short = objective(student, {"dino": Features(averaged, GRID)})
    torch.testing.assert_close(long.loss_B, short.loss_B)


def test_a_first_frame_that_the_teacher_left_out_is_not_compared() -> None:
    objective = build()
    tokens_BND, features = draw(2, 24, 6), Features(draw(2, 8, 8, 5, seed=1), (8, 2, 4))
    terms = objective({0: Tokens(tokens_BND, GRID)}, {"dino": features})
    changed = tokens_BND.clone()
    changed[:, :8] = 7.0
    other = objective({0: Tokens(changed, GRID)}, {"dino": features})
    assert torch.equal(terms.loss_B, other.loss_B)


def test_defaults_are_the_released_ones() -> None:
    config = IRepaConfig(teacher="dino")
    assert (config.weight, config.blocks, config.gamma) == (1.0, (7,), 0.6)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        IRepaConfig(teacher="dino", gamma=1.1)


def test_each_part_can_be_left_out_by_itself() -> None:
    student, target_BTPD = Tokens(draw(2, 24, 6), GRID), draw(2, 3, 8, 5, seed=1)
    teacher = {"dino": Features(target_BTPD, GRID)}
    convolution = build(spatial_norm=False)
    projector = convolution.projectors["block_0_teacher_0"]
    projected_BND = project_frames(projector, student.tokens_BND, GRID)
    plain = repa_loss(projected_BND, target_BTPD.flatten(1, 2))
    torch.testing.assert_close(convolution({0: student}, teacher).loss_B, plain)
    zscored = build(projector="mlp", projector_dim=16, gamma=0.8)
    projector = zscored.projectors["block_0_teacher_0"]
    like_repa = repa_projector(6, 5, 16, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, projector.parameters(), like_repa.parameters()))
    projected_BTPD = like_repa(student.tokens_BND).view(target_BTPD.shape)
    expected = irepa_loss(projected_BTPD, target_BTPD, gamma=0.8)
    torch.testing.assert_close(zscored({0: student}, teacher).loss_B, expected)
    assert next(build(projector="mlp").projectors.parameters()).shape == (2048, 6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"projector": "mlp", "spatial_norm": False}, "is REPA; set name: repa"),
        ({"projector_dim": 8}, "nothing reads it with projector: conv"),
        ({"spatial_norm": False, "gamma": 0.7}, "nothing reads it without spatial_norm"),
    ],
)
def test_what_is_not_read_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IRepaConfig(teacher="dino", **settings)
    again = IRepaConfig(teacher="dino", spatial_norm=False)
    assert IRepaConfig.model_validate(again.model_dump()) == again  # as a run's own recipe is read
