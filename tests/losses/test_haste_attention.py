"""HASTE's attention term: golden value, loops, the authors' values, frames and pairs of layers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.losses import build_objective, haste_attention
from alignlab.losses.haste_attention import (
    HasteAttention,
    HasteAttentionConfig,
    attention_alignment_loss,
    attention_cross_entropy,
)
from alignlab.losses.objective import Features, Tokens
from alignlab.losses.weight import GradientShare
from authors_values import stored_numbers, wave
from random_tensors import draw_double, golden_pair

SINE, COSINE = golden_pair(1, 1, 6, 4)
GRID = (3, 1, 5)


def build(**settings: Any) -> HasteAttention:
    config = HasteAttentionConfig(**{"teacher": "dino", "blocks": (0,), **settings})
    dims = dict.fromkeys(config.teachers, 1)  # of no matter, there is no projector
    objective = build_objective(config, student_dim=1, teacher_dims=dims)
    assert isinstance(objective, HasteAttention)
    return objective


def dot(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([a * b for a, b in zip(one, other, strict=True)]).sum()


def row_by_loops(tokens_PD: Tensor, row: int, head: int, heads: int) -> list[Tensor]:
    """How one token of a frame attends to each of them, in one head."""
    width = tokens_PD.shape[1] // (2 * heads)
    start = head * width
    query = tokens_PD[row, start : start + width]
    keys = [x[heads * width + start : heads * width + start + width] for x in tokens_PD]
    shares = [torch.exp(dot(query, key) / math.sqrt(width)) for key in keys]
    return [share / torch.stack(shares).sum() for share in shares]


def by_loops(student_TPD: Tensor, teacher_TGPD: Tensor, heads: tuple[int, int, int]) -> Tensor:
    """One sample: every frame, head, row and column."""
    own, others, most = heads
    rows = []
    for frame, group in zip(student_TPD, teacher_TGPD, strict=True):
        for head in range(min(heads)):
            for row in range(len(frame)):
                maps = [row_by_loops(x, row, head, others) for x in group]
                target = [sum(shares) / len(group) for shares in zip(*maps, strict=True)]
                found = row_by_loops(frame, row, head, own)
                rows.append(-dot(torch.stack(target), torch.stack(found).log()))
    assert most >= 1
    return torch.stack(rows).mean()


def test_reproduces_its_golden_value() -> None:
    loss_B = attention_cross_entropy(SINE @ SINE.mT, COSINE @ COSINE.mT)
    assert loss_B.tolist() == pytest.approx([1.27951047], abs=5e-9)


def test_maps_of_queries_and_keys_give_the_golden_value_too() -> None:
    """The square root of four channels is taken out of the golden value's logits."""
    student, teacher = (torch.cat([2 * x, x], -1) for x in (SINE, COSINE))
    loss_B = attention_alignment_loss(
        student, teacher[:, :, None], student_heads=1, teacher_heads=1
    )
    assert loss_B.tolist() == pytest.approx([1.27951047], abs=5e-9)


@pytest.mark.parametrize("at_once", [1, 2 * 25, haste_attention.MAP_NUMBERS])
@pytest.mark.parametrize("heads", [(3, 2, 12), (2, 3, 1)])
def test_agrees_with_loops_in_value_and_gradient(
    heads: tuple[int, int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where maps are made a few at a time, those of a frame or of a sample in two parts."""
    monkeypatch.setattr(haste_attention, "MAP_NUMBERS", at_once)
    own, others, most = heads
    student = draw_double(2, 3, 5, 2 * own * 4, seed=0).requires_grad_()
    teacher = draw_double(2, 3, 2, 5, 2 * others * 3, seed=1).requires_grad_()
    ours = attention_alignment_loss(
        student, teacher, student_heads=own, teacher_heads=others, heads=most
    )
    pairs = zip(student, teacher.detach(), strict=True)
    loops = torch.stack([by_loops(*pair, heads) for pair in pairs])
    torch.testing.assert_close(ours, loops)
    weights = torch.tensor([1.0, -0.3], dtype=torch.float64)
    found, expected = (torch.autograd.grad((x * weights).sum(), student)[0] for x in (ours, loops))
    torch.testing.assert_close(found, expected)
    assert found.abs().sum() > 0
    again = attention_alignment_loss(
        student.detach(), teacher, student_heads=own, teacher_heads=others
    )
    assert not again.requires_grad  # nothing reaches the teacher


def test_gives_what_the_authors_loss_gives() -> None:
    """Sixteen heads of the student, twelve of a teacher with a class token, blocks 4 to 7."""
    expected = stored_numbers("haste_attention")
    student = wave(2, 256, 64, phase=1.0).requires_grad_()
    teacher = wave(2, 257, 48, phase=2.0)[:, 1:]
    tapped = {b: Tokens(_projected(student, float(b)), (1, 16, 16), heads=16) for b in range(4, 8)}
    layers = torch.cat([_projected(teacher, 20.0 + layer) for layer in range(8, 12)], -1)
    features = Features(layers[:, None], (1, 16, 16), (12,) * 4)
    objective = build(blocks=HasteAttentionConfig(teacher="dino").blocks)
    loss = objective(tapped, {"dino": features}).loss_B.mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(expected["gradient_norm"], rel=1e-9)


def _projected(tokens_BND: Tensor, phase: float) -> Tensor:
    """Queries and keys of a layer whose weights are waves."""
    width = tokens_BND.shape[-1]
    weight = wave(3 * width, width, phase=phase) * 0.4 / width**0.5
    bias = 0.1 * wave(3 * width, phase=phase)
    return F.linear(tokens_BND, weight[: 2 * width], bias[: 2 * width])


def student_of(seed: int, heads: int = 2) -> Tokens:
    return Tokens(draw_double(2, 15, heads * 6, seed=seed), GRID, heads=heads)


def test_pixel_frames_of_a_latent_frame_share_it_by_the_mean_of_their_maps() -> None:
    """Not by the map of their mean queries and keys; the first frame has one of its own."""
    tokens, teacher = student_of(0), draw_double(2, 9, 5, 12, seed=1)
    found = build()({0: tokens}, {"dino": Features(teacher, (9, 1, 5), (2,))}).loss_B
    heads = {"student_heads": 2, "teacher_heads": 2}
    frames = tokens.tokens_BND.unflatten(1, (3, 5))
    first = attention_alignment_loss(frames[:, :1], teacher[:, :1, None], **heads)
    later = attention_alignment_loss(frames[:, 1:], teacher[:, 1:].unflatten(1, (2, 4)), **heads)
    torch.testing.assert_close(found, (first + 2 * later) / 3)
    means = torch.cat([teacher[:, :1], teacher[:, 1:].unflatten(1, (2, 4)).mean(2)], 1)
    of_means = build()({0: tokens}, {"dino": Features(means, GRID, (2,))}).loss_B
    assert (found - of_means).abs().min() > 1e-3


def test_pairs_blocks_with_layers_in_order_over_all_teachers() -> None:
    layers = [draw_double(2, 3, 5, 12, seed=s) for s in (5, 6, 7)]
    teacher = {
        "a": Features(torch.cat(layers[:2], -1), GRID, (2, 2)),
        "b": Features(layers[2], GRID, (2,)),
    }
    student = {block: student_of(block) for block in (8, 1, 3)}
    alone = [
        build(blocks=(block,))(
            {block: student[block]}, {"dino": Features(layer, GRID, (2,))}
        ).loss_B
        for block, layer in zip(student, layers, strict=True)
    ]
    together = build(blocks=(8, 1, 3), teacher=("a", "b"))(student, teacher)
    torch.testing.assert_close(together.loss_B, torch.stack(alone).mean(0))
    kl = together.parts["kl"]
    assert (kl > 0).all() and (kl < together.parts["cross_entropy"]).all()


def test_one_block_goes_with_every_layer_and_one_layer_with_every_block() -> None:
    config = HasteAttentionConfig(teacher="dino", blocks=(4, 6))
    assert config.pairs(2) == [(4, 0), (6, 1)] and config.pairs(1) == [(4, 0), (6, 0)]
    assert config.model_copy(update={"blocks": (5,)}).pairs(3) == [(5, 0), (5, 1), (5, 2)]
    with pytest.raises(ValueError, match="names 2 blocks, and the teacher's feature 3 layers"):
        config.pairs(3)


def test_the_teachers_own_maps_are_the_least_and_have_no_divergence() -> None:
    tokens = student_of(3)
    own = Features(tokens.tokens_BND.unflatten(1, (3, 5)), GRID, (2,))
    same, other = (build()({0: x}, {"dino": own}) for x in (tokens, student_of(4)))
    torch.testing.assert_close(same.parts["kl"], torch.zeros(2, dtype=torch.float64))
    assert (other.loss_B > same.loss_B).all()


def test_what_is_no_attention_is_refused() -> None:
    hidden = Tokens(draw_double(2, 15, 12), GRID)
    teacher = {"dino": Features(draw_double(2, 3, 5, 12), GRID, (2,))}
    with pytest.raises(ValueError, match="reads queries and keys, and got hidden tokens"):
        build()({0: hidden}, teacher)
    with pytest.raises(ValueError, match="the teacher's feature 0 layers"):
        build()({0: student_of(0)}, {"dino": Features(draw_double(2, 3, 5, 12), GRID)})
    with pytest.raises(ValueError, match=r"12 channels are no queries and keys of \[5\] heads"):
        Tokens(draw_double(2, 15, 12), GRID, heads=5)
    with pytest.raises(ValueError, match=r"12 channels are no queries and keys of \[2, 4\] heads"):
        Features(draw_double(2, 3, 5, 12), GRID, (2, 4))
    with pytest.raises(ValueError, match=r"\(1, 2, 5, 4\) .* differ in batch, frames or tokens"):
        attention_alignment_loss(
            draw_double(1, 2, 5, 4), draw_double(1, 3, 1, 5, 4), student_heads=1, teacher_heads=1
        )
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 2\) and teacher \(1, 1, 3, 3\) differ"):
        attention_cross_entropy(draw_double(1, 1, 2, 2), draw_double(1, 1, 3, 3))


def test_its_weight_is_a_number() -> None:
    with pytest.raises(ValueError, match="its attention maps are made before that; give a number"):
        HasteAttentionConfig(teacher="dino", weight=GradientShare(gradient_share=0.1))
