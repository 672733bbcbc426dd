"""SRA: the authors' values, loops, what its average is, settings that make no sense."""

from typing import Any

import pytest
import torch

from alignlab.losses import build_objective
from alignlab.losses.objective import Features, Tokens, self_key
from alignlab.losses.sra import SraConfig, self_alignment_loss
from authors_values import stored_numbers, wave
from random_tensors import draw, draw_double


def test_smooth_l1_is_the_authors() -> None:
    expected = stored_numbers("sra")
    student = wave(2, 7, 5, phase=1.0).requires_grad_()
    teacher = wave(2, 7, 5, phase=2.0) + 0.3
    loss = self_alignment_loss(student, teacher, loss="smooth_l1").mean()
    assert loss.item() == pytest.approx(expected["smooth_l1"], rel=1e-12)
    torch.autograd.backward(loss)
    assert student.grad is not None
    norm = student.grad.norm().item()
    assert norm == pytest.approx(expected["smooth_l1_gradient_norm"], rel=1e-9)


def test_the_cosine_is_the_authors_along_channels() -> None:
    """The released code takes it along tokens: 1 minus ours with the two axes swapped."""
    expected = stored_numbers("sra")
    student, teacher = wave(2, 7, 5, phase=1.0), wave(2, 7, 5, phase=2.0) + 0.3
    ours = 1 + self_alignment_loss(student, teacher).mean().item()
    assert ours == pytest.approx(expected["cos_over_channels"], rel=1e-9)
    along_tokens = 1 + self_alignment_loss(student.mT, teacher.mT).mean().item()
    assert along_tokens == pytest.approx(expected["cos_as_released"], rel=1e-9)


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
def test_self_alignment_agrees_with_loops_in_value_and_gradient(loss: Any) -> None:
    student = draw_double(2, 5, 3).requires_grad_()
    teacher = draw_double(2, 5, 3, seed=1)
    loops = []
    for b in range(2):
        total = student.new_zeros(())
        for n in range(5):
            if loss == "cosine":
                dot = torch.dot(student[b, n], teacher[b, n])
                total = total - dot / student[b, n].norm() / teacher[b, n].norm() / 5
                continue
            for d in range(3):
                gap = (student[b, n, d] - teacher[b, n, d]).abs()
                total = total + (gap.square() / 1.4 if gap < 0.7 else gap - 0.35) / 15
        loops.append(total)
    ours = self_alignment_loss(student, teacher, loss=loss, beta=0.7)
    reference = torch.stack(loops)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(reference.sum(), student)
    )


def test_no_gradient_reaches_the_average_and_bfloat16_gives_float32() -> None:
    for loss in ("cosine", "smooth_l1"):
        student, teacher = (draw(2, 4, 3, seed=s).bfloat16().requires_grad_() for s in (0, 1))
        loss_B = self_alignment_loss(student, teacher, loss=loss)
        torch.autograd.backward(loss_B.sum())
        assert loss_B.dtype == torch.float32 and teacher.grad is None and student.grad is not None
    with pytest.raises(ValueError, match="loss 'l2': choose cosine, smooth_l1"):
        self_alignment_loss(draw(1, 2, 3), draw(1, 2, 3), loss="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ"):
        self_alignment_loss(draw(1, 2, 3), draw(1, 3, 3))


def test_each_block_follows_its_own_deeper_one() -> None:
    config = SraConfig(blocks=(0, 1), deep_blocks=(3, 2), projector_dim=8)
    objective = build_objective(config, student_dim=5, teacher_dims={})
    grid = (3, 1, 2)
    tokens = {b: Tokens(draw(2, 6, 5, seed=b), grid) for b in (0, 1)}
    average = {self_key(b): Features(draw(2, 3, 2, 5, seed=b), grid) for b in (2, 3)}
    terms = objective(tokens, average)
    heads = [objective.get_submodule(f"projectors.block_{b}") for b in (0, 1)]
    pairs = [
        self_alignment_loss(
            head(tokens[b].tokens_BND), average[self_key(d)].tokens_BTPD.flatten(1, 2)
        )
        for head, b, d in zip(heads, (0, 1), (3, 2), strict=True)
    ]
    torch.testing.assert_close(terms.loss_B, torch.stack(pairs).mean(0))
    assert terms.similarity_LB is not None
    torch.testing.assert_close(terms.similarity_LB, -torch.stack(pairs).detach())


def test_the_average_forgets_the_start_in_a_short_run_as_in_a_long_one() -> None:
    """With the fixed decay, 82 % of the start would be left after 2,000 steps."""
    config, left = SraConfig(), 1.0
    for step in range(2000):
        left *= config.decay_at(step)
    assert left < 1e-6 and 0.9999**2000 == pytest.approx(0.82, abs=0.01)
    assert config.decay_at(0) == 0.1 and config.decay_at(10**6) == 0.9999
    assert SraConfig(ema=0.5).decay_at(2000) == 0.5
    assert config.taps == {"blocks": (7,)} and config.self_taps == {"deep_blocks": (19,)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (1, 2)}, "deep_blocks names 1 blocks and blocks 2: name one for each"),
        ({"beta": 0.1}, "beta: nothing reads it with loss: cosine; remove it"),
        ({"teacher": "dino"}, "sra reads no teacher; remove teacher"),
        ({"ema": 1.0}, "less than 1"),
        ({"cleaner": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_of_sra_without_meaning_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SraConfig(**settings)
