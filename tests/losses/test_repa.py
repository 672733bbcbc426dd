"""REPA and iREPA's z-score: golden values, invariances, several blocks and teachers."""

from typing import Any

import pytest
import torch
from torch import nn

from alignlab.losses import build_objective
from alignlab.losses.objective import Features, Tokens
from alignlab.losses.repa import Repa, RepaConfig, repa_loss, spatial_zscore
from random_tensors import draw, golden_pair

SINE, COSINE = golden_pair(1, 6, 4)
GRID = (3, 2, 2)


def build(**settings: Any) -> Repa:
    config = RepaConfig(**{"teacher": "dino", "blocks": (0,), "projector_dim": 8, **settings})
    objective = build_objective(config, student_dim=6, teacher_dims={"dino": 5, "clip": 7})
    assert isinstance(objective, Repa)
    return objective


def test_reproduces_the_value_of_the_authors_code() -> None:
    loss_B = repa_loss(SINE, COSINE)
    assert loss_B.shape == (1,)
    assert loss_B.item() == pytest.approx(-0.00094802, abs=5e-9)


def test_gradient_passes_gradcheck_and_skips_the_teacher() -> None:
    student = SINE.clone().requires_grad_()
    teacher = COSINE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: repa_loss(x, COSINE), (student,))
    torch.autograd.backward(repa_loss(student, teacher).sum())
    assert teacher.grad is None


def test_agrees_with_loops_in_value_and_gradient() -> None:
    student = draw(2, 7, 5).double().requires_grad_()
    teacher = draw(2, 7, 5, seed=1).double()
    loops = []
    for b in range(2):
        total = student.new_zeros(())
        for n in range(7):
            dot = sum(
                (student[b, n, d] * teacher[b, n, d] for d in range(5)), student.new_zeros(())
            )
            lengths = student[b, n].square().sum().sqrt() * teacher[b, n].square().sum().sqrt()
            total = total - dot / lengths / 7
        loops.append(total)
    ours, reference = repa_loss(student, teacher), torch.stack(loops)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(reference.sum(), student)
    )


def test_a_first_frame_that_the_teacher_left_out_is_not_compared() -> None:
    objective = build()
    tokens_BND, features = draw(2, 12, 6), Features(draw(2, 8, 4, 5, seed=1), (8, 2, 2))
    terms = objective({0: Tokens(tokens_BND, GRID)}, {"dino": features})
    projected = objective.projectors["block_0_teacher_0"](tokens_BND)[:, 4:]
    groups = features.tokens_BTPD.unflatten(1, (2, 4)).mean(2)
    torch.testing.assert_close(terms.loss_B, repa_loss(projected, groups.flatten(1, 2)))


def test_depends_on_direction_and_not_on_length() -> None:
    lengths = draw(1, 6, 1, seed=3).abs() + 0.1
    assert repa_loss(COSINE * lengths, COSINE).item() == pytest.approx(-1)
    assert repa_loss(-COSINE, COSINE).item() == pytest.approx(1)
    rotation, _ = torch.linalg.qr(draw(4, 4).double())
    assert repa_loss(COSINE @ rotation, COSINE).item() > -0.9


def test_zero_vectors_and_bfloat16_are_finite_float32() -> None:
    student = torch.zeros(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    loss_B = repa_loss(student, torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert loss_B.dtype == torch.float32 and loss_B.tolist() == [0.0, 0.0]
    torch.autograd.backward(loss_B.sum())
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match="differ"):
        repa_loss(SINE, COSINE[:, :1])


def test_zscore_reproduces_its_golden_values() -> None:
    zscored = spatial_zscore(COSINE)
    assert zscored[0, 0].tolist() == pytest.approx(
        [1.165380, 0.773776, 0.140009, -0.509253], abs=5e-7
    )
    assert repa_loss(SINE, zscored).item() == pytest.approx(-0.00177990, abs=5e-9)


def test_zscore_is_per_sample_and_channel_and_gamma_scales_the_mean() -> None:
    teacher = draw(2, 9, 4) * 3 + 7
    torch.testing.assert_close(spatial_zscore(teacher)[:1], spatial_zscore(teacher[:1]))
    full = spatial_zscore(teacher, gamma=1.0)
    torch.testing.assert_close(full.mean(1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(full.std(1), torch.ones(2, 4), atol=1e-5, rtol=0)
    assert spatial_zscore(teacher, gamma=0.0).min() > 0
    assert torch.isfinite(spatial_zscore(torch.ones(1, 5, 2))).all()
    with pytest.raises(ValueError, match="at least 2 tokens"):
        spatial_zscore(teacher[:, :1])


def test_several_blocks_and_teachers_are_averaged() -> None:
    objective = build(blocks=(0, 4), teacher=("dino", "clip"))
    student = {block: Tokens(draw(2, 12, 6, seed=block), GRID) for block in (0, 4)}
    teacher = {
        "dino": Features(draw(2, 3, 4, 5, seed=7), GRID),
        "clip": Features(draw(2, 3, 4, 7, seed=8), GRID),
    }
    terms = objective(student, teacher)
    pairs = [
        repa_loss(
            objective.projectors[f"block_{block}_teacher_{number}"](student[block].tokens_BND),
            teacher[alias].tokens_BTPD.flatten(1, 2),
        )
        for block in (0, 4)
        for number, alias in enumerate(("dino", "clip"))
    ]
    torch.testing.assert_close(terms.loss_B, torch.stack(pairs).mean(0))
    torch.testing.assert_close(terms.similarity_B, -terms.loss_B)


def test_teacher_frames_are_matched_to_latent_frames() -> None:
    objective = build()
    student = {0: Tokens(draw(2, 12, 6), GRID)}
    frames_BTPD = draw(2, 9, 4, 5, seed=1)
    averaged = torch.stack(
        [frames_BTPD[:, 0], frames_BTPD[:, 1:5].mean(1), frames_BTPD[:, 5:].mean(1)], 1
    )
    long = objective(student, {"dino": Features(frames_BTPD, (9, 2, 2))})
    short = objective(student, {"dino": Features(averaged, GRID)})
    torch.testing.assert_close(long.loss_B, short.loss_B)


def test_projector_is_the_released_one() -> None:
    config = RepaConfig(teacher="dino")
    assert (config.weight, config.blocks, config.projector_dim) == (0.5, (7,), 2048)
    objective = build_objective(config, student_dim=1536, teacher_dims={"dino": 768})
    linears = [layer for layer in objective.modules() if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [
        (2048, 1536),
        (2048, 2048),
        (768, 2048),
    ]
    assert all((layer.bias == 0).all() for layer in linears)
    xavier_bound = (6 / (1536 + 2048)) ** 0.5
    assert linears[0].weight.abs().max().item() == pytest.approx(xavier_bound, rel=1e-3)
