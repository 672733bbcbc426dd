"""CREPA: golden values, a reference written with loops, its limits, its two projectors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab.losses import build_objective
from alignlab.losses.crepa import Crepa, CrepaConfig, Reduction, cross_frame_loss
from alignlab.losses.objective import Features, Tokens
from alignlab.losses.repa import repa_loss
from random_tensors import draw, golden_pair

SINE, COSINE = golden_pair(1, 3, 2, 4)
GRID = (3, 2, 2)


def build(**settings: Any) -> Crepa:
    config = CrepaConfig(**{"teacher": "dino", "blocks": (0,), "projector_dim": 8, **settings})
    objective = build_objective(config, student_dim=6, teacher_dims={"dino": 5})
    assert isinstance(objective, Crepa)
    return objective


def cosine(x: Tensor, y: Tensor) -> Tensor:
    dot = sum((x[d] * y[d] for d in range(len(x))), x.new_zeros(()))
    return dot / (x.square().sum().sqrt() * y.square().sum().sqrt())


def by_loops(
    student: Tensor, teacher: Tensor, distance: int, tau: float, reduction: Reduction
) -> Tensor:
    """One sample (T, P, D): every pair of frames and every token."""
    frames, tokens = student.shape[:2]
    total = student.new_zeros(())
    for f in range(frames):
        for k in range(frames):
            if k == f:
                weight = 1.0
            elif abs(k - f) == distance:
                weight = math.exp(-abs(k - f) / tau)
            else:
                continue
            for p in range(tokens):
                total = total + weight * cosine(student[f, p], teacher[k, p]) / tokens
    return -total / (frames if reduction == "mean" else 1)


def test_reproduces_its_golden_values() -> None:
    loss_B = cross_frame_loss(SINE, COSINE)
    assert loss_B.shape == (1,)
    assert loss_B.item() == pytest.approx(-0.01021960, abs=5e-9)
    mean = cross_frame_loss(SINE, COSINE, reduction="mean")
    assert mean.item() == pytest.approx(-0.00340653, abs=5e-9)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("distance", "tau"), [(1, 1.0), (2, 0.7), (4, 3.0), (5, 1.0), (9, 1.0)])
def test_agrees_with_loops_in_value_and_gradient(
    distance: int, tau: float, reduction: Reduction
) -> None:
    student = draw(2, 5, 3, 7).double().requires_grad_()
    teacher = draw(2, 5, 3, 7, seed=1).double()
    ours = cross_frame_loss(student, teacher, distance=distance, tau=tau, reduction=reduction)
    loops = torch.stack(
        [by_loops(student[b], teacher[b], distance, tau, reduction) for b in range(2)]
    )
    torch.testing.assert_close(ours, loops)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(loops.sum(), student)
    )


@pytest.mark.parametrize("frames", [1, 4])
def test_without_weight_on_neighbours_it_is_repa(frames: int) -> None:
    student, teacher = draw(2, frames, 3, 5).double(), draw(2, frames, 3, 5, seed=1).double()
    repa_B = repa_loss(student.flatten(1, 2), teacher.flatten(1, 2))
    torch.testing.assert_close(cross_frame_loss(student, teacher, tau=1e-3), frames * repa_B)
    mean_B = cross_frame_loss(student, teacher, tau=1e-3, reduction="mean")
    torch.testing.assert_close(mean_B, repa_B)


def test_a_still_video_reaches_one_and_two_neighbours_per_frame() -> None:
    still = draw(1, 1, 3, 5).expand(1, 4, 3, 5)
    neighbour = math.exp(-1 / 2.0)
    best = cross_frame_loss(still, still, tau=2.0).item()
    assert best == pytest.approx(-(4 + 6 * neighbour), rel=1e-5)  # two border frames lack one


def test_the_teacher_gets_no_gradient_and_bfloat16_gives_float32() -> None:
    student, teacher = draw(1, 3, 2, 4).requires_grad_(), draw(1, 3, 2, 4, seed=1).requires_grad_()
    torch.autograd.backward(cross_frame_loss(student, teacher).sum())
    assert student.grad is not None and teacher.grad is None
    half = cross_frame_loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"distance": 0}, "distance"), ({"tau": 0.0}, "tau"), ({"tau": math.nan}, "tau")],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_frame_loss(SINE, COSINE, **settings)
    with pytest.raises(ValueError, match=message):
        CrepaConfig(teacher="dino", **settings)


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match="differ"):
        cross_frame_loss(SINE, COSINE[:, :2])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_parts_add_up_and_the_similarity_is_of_the_same_frame(reduction: Reduction) -> None:
    objective = build(blocks=(0, 3), reduction=reduction, tau=2.0)
    student = {block: Tokens(draw(2, 12, 6, seed=block), GRID) for block in (0, 3)}
    teacher = {"dino": Features(draw(2, 3, 4, 5, seed=7), GRID)}
    terms = objective(student, teacher)
    target = teacher["dino"].tokens_BTPD
    losses, cosines = [], []
    for block in (0, 3):
        projected = objective.projectors[f"block_{block}"](student[block].tokens_BND)
        projected = projected.view(target.shape)
        losses.append(cross_frame_loss(projected, target, tau=2.0, reduction=reduction))
        cosines.append(-repa_loss(projected.flatten(1, 2), target.flatten(1, 2)))
    torch.testing.assert_close(terms.loss_B, (losses[0] + losses[1]) / 2)
    torch.testing.assert_close(terms.parts["own"] + terms.parts["neighbours"], terms.loss_B)
    torch.testing.assert_close(terms.similarity_B, (cosines[0] + cosines[1]) / 2)


def test_a_first_frame_that_the_teacher_left_out_is_not_compared() -> None:
    objective = build(reduction="mean")
    tokens_BND, features = draw(2, 12, 6), Features(draw(2, 8, 4, 5, seed=1), (8, 2, 2))
    terms = objective({0: Tokens(tokens_BND, GRID)}, {"dino": features})
    projected = objective.projectors["block_0"](tokens_BND).unflatten(1, (3, 4))[:, 1:]
    groups = features.tokens_BTPD.unflatten(1, (2, 4)).mean(2)
    expected = cross_frame_loss(projected, groups, reduction="mean")
    torch.testing.assert_close(terms.loss_B, expected)


def test_the_two_projectors() -> None:
    config = CrepaConfig(teacher="dino")
    assert (config.weight, config.blocks, config.distance, config.tau) == (0.5, (7,), 1, 1.0)
    assert (config.reduction, config.projector) == ("sum", "mlp")
    mlp = build_objective(config, student_dim=24, teacher_dims={"dino": 12})
    shapes = [tuple(m.weight.shape) for m in mlp.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(2048, 24), (2048, 2048), (12, 2048)]
    linear = build(projector="linear", projector_dim=None)
    norm, layer = linear.projectors["block_0"].children()
    assert isinstance(norm, nn.LayerNorm) and isinstance(layer, nn.Linear)
    assert tuple(layer.weight.shape) == (5, 6) and layer.bias is not None
    assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert layer.weight.abs().max() <= 6**-0.5 and layer.bias.abs().max() <= 6**-0.5
    with pytest.raises(ValueError, match="nothing reads it with projector: linear"):
        CrepaConfig(teacher="dino", projector="linear", projector_dim=8)
