"""Dispersive loss: a copy of the authors' code, loops, far and equal samples, one sample."""

import math

import pytest
import torch

from alignlab.losses.dispersive import Dispersive, DispersiveConfig, dispersive_loss
from alignlab.losses.objective import Tokens
from authors_values import stored_numbers, wave
from random_tensors import draw, draw_double


def test_value_and_gradient_are_those_of_the_authors_code() -> None:
    """It divides by the number of features, counts i = j and has no temperature."""
    expected = stored_numbers("dispersive")
    z = wave(4, 7, 5, phase=1.0).requires_grad_()
    loss_B = dispersive_loss(z, tau=1.0, per_feature=True, diagonal=True)
    assert loss_B.tolist() == pytest.approx([expected["loss"]] * 4, rel=1e-12)
    torch.autograd.backward(loss_B.mean())
    assert z.grad is not None
    assert z.grad.norm().item() == pytest.approx(expected["gradient_norm"], rel=1e-9)


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_dispersive_agrees_with_loops_in_value_and_gradient(
    per_feature: bool, diagonal: bool
) -> None:
    z = (0.3 * draw_double(5, 3, 2)).requires_grad_()
    terms = []
    for i in range(5):
        for j in range(5):
            if i != j or diagonal:
                square = (z[i] - z[j]).square().sum() / (6 if per_feature else 1)
                terms.append(torch.exp(-square / 0.7))
    reference = torch.stack(terms).mean().log()
    ours = dispersive_loss(z, tau=0.7, per_feature=per_feature, diagonal=diagonal)
    torch.testing.assert_close(ours, reference.expand(5))
    torch.testing.assert_close(
        torch.autograd.grad(ours.mean(), z), torch.autograd.grad(reference, z)
    )


def test_by_default_it_is_the_papers_formula() -> None:
    z = torch.tensor([[[0.0]], [[1.0]], [[3.0]]])
    squares = (1.0, 9.0, 4.0)
    expected = math.log(sum(math.exp(-d / 0.5) for d in squares) / 3)
    assert dispersive_loss(z).tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_far_samples_do_not_underflow_and_equal_ones_have_a_finite_gradient() -> None:
    far = (100 * draw(3, 4, 5)).requires_grad_()
    loss_B = dispersive_loss(far)
    assert torch.isfinite(loss_B).all() and loss_B[0] < -1000
    torch.autograd.backward(loss_B.mean())
    assert far.grad is not None and torch.isfinite(far.grad).all() and far.grad.any()
    equal = torch.ones(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    loss_B = dispersive_loss(equal)
    assert loss_B.dtype == torch.float32 and loss_B.tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    torch.autograd.backward(loss_B.sum())
    assert equal.grad is not None and torch.isfinite(equal.grad).all()


def test_a_step_along_the_gradient_moves_samples_apart() -> None:
    z = draw(4, 6, 5).requires_grad_()
    torch.autograd.backward(dispersive_loss(z, per_feature=True).mean())
    assert z.grad is not None
    moved = z.detach() - 10 * z.grad
    before, after = (torch.nn.functional.pdist(x.detach().flatten(1)).mean() for x in (z, moved))
    assert after > before


def test_the_objective_has_a_floor_however_far_samples_are() -> None:
    """Without one, a training from scratch diverged within 300 steps."""
    objective = Dispersive(DispersiveConfig(blocks=(0,)), student_dim=5, teacher_dims={})
    for scale in (1.0, 1e3, 1e8):
        tokens = Tokens(scale * draw(4, 4, 5), (1, 2, 2))
        assert (objective({0: tokens}, {}).loss_B >= -math.log(4) - 1e-6).all()


def test_one_sample_is_refused() -> None:
    objective = Dispersive(DispersiveConfig(blocks=(0,)), student_dim=5, teacher_dims={})
    assert objective.couples_samples and objective.whole_step
    with pytest.raises(ValueError, match="compares samples, and there is 1: give two or more"):
        objective({0: Tokens(draw(1, 4, 5), (1, 2, 2))}, {})
