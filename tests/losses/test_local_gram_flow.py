"""Local Gram flow: a port's values, loops with borders, what it sees, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.kernels.local_gram import next_frame_products
from alignlab.losses import build_objective
from alignlab.losses.local_gram_flow import LocalGramFlowConfig, local_gram_flow_loss
from alignlab.losses.objective import Features, Tokens
from authors_values import stored_numbers, wave
from random_tensors import draw, draw_double


def test_tokens_within_the_frame_have_the_ports_values() -> None:
    """Of one channel: of more, the port takes an unfold's channels for places of the window.

    At borders it gives what lies outside a product of 0 and a share.
    """
    expected = stored_numbers("local_gram_flow")
    student, teacher = (0.5 * wave(1, 3, 81, 1, phase=p).unflatten(2, (9, 9)) for p in (1.0, 2.0))
    student.requires_grad_()
    log_student, log_teacher = (
        F.log_softmax(next_frame_products(x, 7)[:, :, 3:6, 3:6] / 0.1, -1)
        for x in (student, teacher)
    )
    loss = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected["interior"], rel=1e-12)
    torch.autograd.backward(loss)
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(expected["gradient_norm"], rel=1e-9)


def by_loops(student: Tensor, teacher: Tensor, window: int, temperature: float) -> Tensor:
    batch, frames, height, width, _ = student.shape
    losses = []
    for b in range(batch):
        kls = []
        for t in range(frames - 1):
            for y in range(height):
                for x in range(width):
                    near = [
                        (v, u)
                        for v in range(y - window // 2, y + window // 2 + 1)
                        for u in range(x - window // 2, x + window // 2 + 1)
                        if 0 <= v < height and 0 <= u < width
                    ]
                    ours, theirs = (
                        torch.stack([torch.dot(z[b, t, y, x], z[b, t + 1, v, u]) for v, u in near])
                        / temperature
                        for z in (student, teacher)
                    )
                    p = theirs.softmax(0)
                    kls.append((p * (p.log() - ours.log_softmax(0))).sum())
        losses.append(torch.stack(kls).mean())
    return torch.stack(losses)


@pytest.mark.parametrize(("size", "window"), [((3, 5), 3), ((2, 4), 7), ((1, 1), 3)])
def test_local_gram_flow_agrees_with_loops_in_value_and_gradient(
    size: tuple[int, int], window: int
) -> None:
    student = draw_double(2, 3, *size, 4).requires_grad_()
    teacher = draw_double(2, 3, *size, 3, seed=1)
    ours = local_gram_flow_loss(student, teacher, window=window, temperature=0.8)
    reference = by_loops(student, teacher, window, 0.8)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(reference.sum(), student)
    )


def test_it_is_zero_for_the_teacher_itself_and_positive_otherwise() -> None:
    teacher = draw(2, 3, 4, 5, 6)
    torch.testing.assert_close(local_gram_flow_loss(teacher, teacher), torch.zeros(2))
    rotation, _ = torch.linalg.qr(draw(6, 6))
    turned = local_gram_flow_loss(teacher @ rotation, teacher)
    torch.testing.assert_close(turned, torch.zeros(2), atol=1e-3, rtol=0)
    assert (local_gram_flow_loss(teacher.flip(2), teacher) > 1).all()


def test_unit_vectors_leave_lengths_alone() -> None:
    student, teacher = draw(1, 2, 3, 3, 4), draw(1, 2, 3, 3, 4, seed=1)
    lengths = draw(1, 2, 3, 3, 1, seed=2).abs() + 0.1
    plain, longer = (
        local_gram_flow_loss(x, teacher, normalize=True) for x in (student, student * lengths)
    )
    torch.testing.assert_close(plain, longer)
    assert not torch.allclose(local_gram_flow_loss(student * lengths, teacher), plain)


def test_no_gradient_reaches_the_teacher_and_bfloat16_gives_float32() -> None:
    student, teacher = (draw(1, 2, 3, 3, 4, seed=s).bfloat16().requires_grad_() for s in (0, 1))
    loss_B = local_gram_flow_loss(student, teacher)
    torch.autograd.backward(loss_B.sum())
    assert loss_B.dtype == torch.float32 and teacher.grad is None and student.grad is not None


def test_nothing_of_the_size_of_an_unfold_is_kept_for_the_backward_pass() -> None:
    """Views of the features, and a few numbers for each place of the window."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    student, teacher = draw(1, 3, 8, 8, 64).requires_grad_(), draw(1, 3, 8, 8, 64, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss_B = local_gram_flow_loss(student, teacher)
    unfolded = 2 * 64 * 64 * 49 * 4  # bytes: frames, tokens, width, places
    assert loss_B.requires_grad and sum(kept.values()) < unfolded / 4


@pytest.mark.parametrize(
    ("shapes", "window", "message"),
    [
        (((1, 2, 3, 3, 4), (1, 2, 3, 4, 4)), 7, "differ"),
        (((1, 1, 3, 3, 4), (1, 1, 3, 3, 4)), 7, "a frame with the next, and there is one"),
        (((1, 2, 3, 3, 4), (1, 2, 3, 3, 4)), 4, "window 4 has no middle"),
    ],
)
def test_what_has_no_next_frame_or_middle_is_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], window: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        local_gram_flow_loss(draw(*shapes[0]), draw(*shapes[1]), window=window)


@pytest.mark.parametrize(("side", "grid"), [("student", (3, 2, 2)), ("teacher", (5, 4, 4))])
def test_student_and_teacher_meet_on_the_grid_that_is_asked_for(
    side: str, grid: tuple[int, int, int]
) -> None:
    config = LocalGramFlowConfig.model_validate(
        {"teacher": "dino", "blocks": [0], "projector_dim": 8, "grid": side, "window": 3}
    )
    objective = build_objective(config, student_dim=6, teacher_dims={"dino": 5})
    seen: list[Any] = []

    def loss(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
        seen.append((student.shape[1:4], teacher.shape[1:4], settings))
        return local_gram_flow_loss(student, teacher, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignlab.losses.local_gram_flow.local_gram_flow_loss", loss)
        tokens = Tokens(draw(2, 12, 6), (3, 2, 2))
        terms = objective({0: tokens}, {"dino": Features(draw(2, 5, 16, 5), (5, 4, 4))})
    settings = {"window": 3, "temperature": 0.1, "normalize": True, "impl": "auto"}
    assert seen == [(grid, grid, settings)] and terms.loss_B.shape == (2,)


def test_an_even_window_is_refused_in_a_recipe() -> None:
    with pytest.raises(ValueError, match="window 6 has no middle: give an odd one"):
        LocalGramFlowConfig(teacher="dino", window=6)
