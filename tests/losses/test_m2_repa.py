"""M2-REPA: loops, a port's values, what CKA does not see, heads, teachers' own grids."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab.losses import build_objective
from alignlab.losses.grids import match_grid
from alignlab.losses.m2_repa import (
    M2Repa,
    M2RepaConfig,
    decoupled_alignment_loss,
    heads_cka,
)
from alignlab.losses.objective import Features, Tokens
from alignlab.losses.repa import RepaConfig, repa_loss
from alignlab.metrics import cka
from authors_values import stored_numbers, wave
from random_tensors import draw, draw_double

GRID = (3, 2, 2)
WIDTHS = (5, 3, 4)


def build(**settings: Any) -> M2Repa:
    config = {"teacher": ("dino", "sam"), "blocks": (0,), "projector_dim": 8, **settings}
    objective = build_objective(
        M2RepaConfig(**config), student_dim=6, teacher_dims={"dino": 5, "sam": 3}
    )
    assert isinstance(objective, M2Repa)
    return objective


def dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([a * b for a, b in zip(left, right, strict=True)]).sum()


def squared_by_loops(left: list[list[Tensor]], right: list[list[Tensor]]) -> Tensor:
    """Of every channel of one with every channel of the other, over the tokens."""
    channels = ([list(c) for c in zip(*side, strict=True)] for side in (left, right))
    first, second = channels
    return torch.stack([dot(a, b).square() for a in first for b in second]).sum()


def by_loops(heads: list[Tensor], teachers: list[Tensor], decouple: float) -> Tensor:
    """One sample, (N, D) each: every token, channel and pair of heads."""
    aligned = heads[0].new_zeros(())
    centred = []
    for head, teacher in zip(heads, teachers, strict=True):
        count = len(head)
        for n in range(count):
            h, f = list(head[n]), list(teacher[n])
            aligned = aligned - dot(h, f) / (dot(h, h) * dot(f, f)).sqrt() / count / len(heads)
        means = [sum(head[n, d] for n in range(count)) / count for d in range(head.shape[1])]
        centred.append([[x - mean for x, mean in zip(row, means, strict=True)] for row in head])
    pairs = [
        squared_by_loops(x, y) / (squared_by_loops(x, x) * squared_by_loops(y, y)).sqrt()
        for x, y in combinations(centred, 2)
    ]
    return aligned + decouple * torch.stack(pairs).mean()


@pytest.mark.parametrize("count", [2, 3])
def test_decoupled_alignment_agrees_with_loops_in_value_and_gradient(count: int) -> None:
    heads = [draw_double(2, 7, d, seed=d).requires_grad_() for d in WIDTHS[:count]]
    teachers = [draw_double(2, 7, d, seed=10 + d) for d in WIDTHS[:count]]
    ours = decoupled_alignment_loss(heads, teachers, decouple=0.7)
    loops = torch.stack(
        [by_loops([h[b] for h in heads], [t[b] for t in teachers], 0.7) for b in range(2)]
    )
    torch.testing.assert_close(ours, loops)
    weights = torch.tensor([1.0, -0.3], dtype=torch.float64)
    found, expected = (torch.autograd.grad((x * weights).sum(), heads) for x in (ours, loops))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_one_sample_has_the_values_of_a_port() -> None:
    expected = stored_numbers("m2_repa")
    heads = [wave(1, 23, d, phase=float(d)).requires_grad_() for d in WIDTHS]
    teachers = [wave(1, 23, d, phase=0.5 + d) for d in WIDTHS]
    alike = heads_cka(heads)
    assert alike.item() == pytest.approx(expected["cka"], rel=1e-6)  # it computes in float32
    loss = decoupled_alignment_loss(heads, teachers)
    assert loss.item() == pytest.approx(expected["align"] + 0.05 * expected["cka"], rel=1e-6)
    torch.autograd.backward(alike.sum())
    norm = torch.stack([h.grad.square().sum() for h in heads if h.grad is not None]).sum().sqrt()
    assert norm.item() == pytest.approx(expected["cka_gradient_norm"], rel=1e-5)


def test_cka_is_that_of_the_metric_and_blind_to_rotation_scale_and_place() -> None:
    left, right = draw_double(1, 40, 5), draw_double(1, 40, 3, seed=1)
    right = right + left[..., :3]
    found = heads_cka([left, right]).item()
    # the metric is of unit rows
    rows = [torch.nn.functional.normalize(x, dim=-1) for x in (left, right)]
    assert heads_cka(rows).item() == pytest.approx(cka(left[0], right[0]), rel=1e-9)
    turn, _ = torch.linalg.qr(draw_double(5, 5, seed=2))
    moved = 30 * left @ turn + draw_double(5, seed=3)
    assert heads_cka([moved, right]).item() == pytest.approx(found, rel=1e-9)
    assert heads_cka([left, moved]).item() == pytest.approx(1.0)
    assert 0.1 < found < 0.9


def test_the_term_drives_heads_apart_and_no_sample_sees_another() -> None:
    heads = [draw_double(2, 60, 4, seed=s) for s in (0, 1)]
    heads[1] = (heads[0] + heads[1]).requires_grad_()
    before = heads_cka(heads)
    (gradient,) = torch.autograd.grad(before[0], heads[1])
    assert not gradient[1].any()
    after = heads_cka([heads[0], heads[1] - 0.5 * gradient])
    assert after[0] < before[0] and after[1] == before[1]


def test_a_constant_head_and_a_head_alone_are_like_no_other() -> None:
    flat = torch.full((1, 6, 3), 2.0).requires_grad_()
    alike = heads_cka([flat, draw(1, 6, 4)])
    torch.autograd.backward(alike.sum())
    assert alike.item() == 0 and flat.grad is not None and not flat.grad.any()
    teacher = draw(2, 6, 3, seed=1)
    alone = decoupled_alignment_loss([draw(2, 6, 3)], [teacher], decouple=9.0)
    assert torch.equal(alone, repa_loss(draw(2, 6, 3), teacher))


def test_bfloat16_heads_and_autocast_give_float32_and_teachers_get_no_gradient() -> None:
    heads = [draw(2, 9, 4, seed=s).bfloat16().requires_grad_() for s in (0, 1)]
    teachers = [draw(2, 9, 4, seed=s).requires_grad_() for s in (2, 3)]
    exact = decoupled_alignment_loss([h.float() for h in heads], teachers, decouple=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss_B = decoupled_alignment_loss(heads, teachers, decouple=1.0)
    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B, exact, rtol=1e-6, atol=1e-6)
    torch.autograd.backward(loss_B.sum())
    assert all(h.grad is not None for h in heads) and all(t.grad is None for t in teachers)


@pytest.mark.parametrize(
    ("heads", "teachers", "message"),
    [
        ([], [], "0 heads and 0 teachers: give one for each"),
        ([(1, 4, 2)] * 2, [(1, 4, 2)], "2 heads and 1 teachers: give one for each"),
        ([(1, 4, 2)] * 2, [(1, 4, 2), (1, 4, 3)], "differ"),
        ([(1, 4, 2), (1, 3, 2)], [(1, 4, 2), (1, 3, 2)], "heads must share batch and tokens"),
    ],
)
def test_heads_that_do_not_fit_are_refused(heads: Any, teachers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoupled_alignment_loss([draw(*s) for s in heads], [draw(*s) for s in teachers])


def test_each_head_follows_its_teacher_on_the_students_grid() -> None:
    """A first frame that one teacher left out is in no cosine and in no CKA."""
    objective = build(blocks=(0, 2), decouple=0.3)
    student = {block: Tokens(draw(2, 12, 6, seed=block), GRID) for block in (0, 2)}
    dino = Features(draw(2, 9, 4, 5, seed=7), (9, 2, 2))
    sam = Features(draw(2, 8, 16, 3, seed=8), (8, 4, 4))
    terms = objective(student, {"dino": dino, "sam": sam})
    targets = [match_grid(x.tokens_BTPD, x.grid, GRID)[:, -2:].flatten(1, 2) for x in (dino, sam)]
    per_block, alike = [], []
    for block in (0, 2):
        heads = [
            objective.heads[f"block_{block}_teacher_{k}"](student[block].tokens_BND)[:, 4:]
            for k in range(2)
        ]
        per_block.append(decoupled_alignment_loss(heads, targets, decouple=0.3))
        alike.append(heads_cka(heads))
    torch.testing.assert_close(terms.loss_B, torch.stack(per_block).mean(0))
    torch.testing.assert_close(terms.parts["cka"], torch.stack(alike).mean(0).detach())
    assert terms.similarity_B is not None
    torch.testing.assert_close(terms.similarity_B, -terms.parts["align"])


def test_without_decoupling_it_is_repa_with_the_same_heads() -> None:
    settings: dict[str, Any] = {"teacher": ("dino", "sam"), "blocks": (0,), "projector_dim": 8}
    repa = build_objective(
        RepaConfig(**settings), student_dim=6, teacher_dims={"dino": 5, "sam": 3}
    )
    student = {0: Tokens(draw(2, 12, 6), GRID)}
    teacher = {
        alias: Features(draw(2, 3, 4, width, seed=width), GRID)
        for alias, width in (("dino", 5), ("sam", 3))
    }
    ours = build(decouple=0.0)(student, teacher)
    torch.testing.assert_close(ours.loss_B, repa(student, teacher).loss_B)


def test_defaults_of_m2_repa_and_what_it_refuses() -> None:
    config = M2RepaConfig(teacher=("dino", "sam"))
    assert (config.weight, config.blocks, config.projector_dim) == (0.5, (7,), 2048)
    assert isinstance(config.weight, float) and config.weight * config.decouple == 0.05
    objective = build_objective(config, student_dim=24, teacher_dims={"dino": 12, "sam": 7})
    shapes = [tuple(m.weight.shape) for m in objective.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(2048, 24), (2048, 2048), (12, 2048), (2048, 24), (2048, 2048), (7, 2048)]
    for teacher in ("dino", ("dino",)):
        with pytest.raises(ValueError, match="teacher names dino alone: name two or more, or take"):
            M2RepaConfig(teacher=teacher)
