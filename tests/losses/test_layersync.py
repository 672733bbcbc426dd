"""LayerSync: the authors' values, loops, where the gradient goes, pairs of blocks."""

from typing import Any

import pytest
import torch

from alignlab.losses import build_objective
from alignlab.losses.layersync import LayerSync, LayerSyncConfig, layersync_loss
from alignlab.losses.objective import Objective, Tokens
from authors_values import stored_numbers, wave
from random_tensors import draw, draw_double

GRID = (3, 1, 2)


def build(**settings: Any) -> Objective:
    return build_objective(LayerSyncConfig(**settings), student_dim=5, teacher_dims={})


def test_values_and_gradients_are_those_of_the_authors_code() -> None:
    expected = stored_numbers("layersync")
    for detach, one in ((False, expected["wan"]), (True, expected["sit"])):
        shallow = wave(2, 7, 5, phase=1.0).requires_grad_()
        deep = (wave(2, 7, 5, phase=2.0) + 0.3).requires_grad_()
        loss_B = layersync_loss(shallow, deep, detach=detach)
        torch.autograd.backward(loss_B.mean())
        if detach:
            assert loss_B.tolist() == pytest.approx(one["loss_B"], rel=1e-12)
            assert deep.grad is None
        else:
            assert loss_B.mean().item() == pytest.approx(one["loss"], rel=1e-12)
            assert deep.grad is not None
            norm = deep.grad.norm().item()
            assert norm == pytest.approx(one["deep_gradient_norm"], rel=1e-9)
        assert shallow.grad is not None
        assert shallow.grad.norm().item() == pytest.approx(one["shallow_gradient_norm"], rel=1e-9)


def test_layersync_agrees_with_loops_in_value_and_both_gradients() -> None:
    shallow, deep = (draw_double(2, 5, 3, seed=s).requires_grad_() for s in (0, 1))
    loops = []
    for b in range(2):
        total = shallow.new_zeros(())
        for n in range(5):
            dot = torch.dot(shallow[b, n], deep[b, n])
            total = total - dot / (shallow[b, n].norm() * deep[b, n].norm()) / 5
        loops.append(total)
    ours, reference = layersync_loss(shallow, deep, detach=False), torch.stack(loops)
    torch.testing.assert_close(ours, reference)
    found, expected = (torch.autograd.grad(x.sum(), (shallow, deep)) for x in (ours, reference))
    torch.testing.assert_close(found, expected)


def test_other_shapes_of_the_two_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shallow \(1, 4, 3\) and deep \(1, 5, 3\) tokens differ"):
        layersync_loss(draw(1, 4, 3), draw(1, 5, 3))


def test_each_block_is_compared_with_its_own_deeper_one() -> None:
    tokens = {b: Tokens(draw(2, 6, 5, seed=b), GRID) for b in (0, 1, 4, 6)}
    objective = build(blocks=(0, 1), deep_blocks=(6, 4))
    assert not list(objective.parameters()) and isinstance(objective, LayerSync)
    terms = objective(tokens, {})
    pairs = [
        layersync_loss(tokens[a].tokens_BND, tokens[b].tokens_BND) for a, b in ((0, 6), (1, 4))
    ]
    torch.testing.assert_close(terms.loss_B, (pairs[0] + pairs[1]) / 2)
    assert terms.similarity_LB is not None
    torch.testing.assert_close(terms.similarity_LB, -torch.stack(pairs))


@pytest.mark.parametrize("detach", [True, False])
def test_the_deeper_block_is_moved_only_where_it_is_not_detached(detach: bool) -> None:
    tokens = {b: Tokens(draw(1, 6, 5, seed=b).requires_grad_(), GRID) for b in (1, 2)}
    terms = build(blocks=(1,), deep_blocks=(2,), detach=detach)(tokens, {})
    torch.autograd.backward(terms.loss_B.mean())
    assert tokens[1].tokens_BND.grad is not None
    assert (tokens[2].tokens_BND.grad is None) == detach


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (1, 2)}, "deep_blocks names 1 blocks and blocks 2: name a deeper one for each"),
        ({"deep_blocks": ()}, "deep_blocks names 0 blocks and blocks 1"),
        ({"blocks": (8,), "deep_blocks": (8,)}, "deep_blocks: block 8 is not deeper than block 8"),
        ({"teacher": "dino"}, "layersync reads no teacher; remove teacher"),
    ],
)
def test_blocks_that_make_no_pairs_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerSyncConfig(**settings)


def test_both_sides_of_the_pairs_are_tapped() -> None:
    config = LayerSyncConfig(blocks=(0, 3), deep_blocks=(3, 5))
    assert config.taps == {"blocks": (0, 3), "deep_blocks": (3, 5)}
    assert config.tapped_blocks == (0, 3, 5) and config.teachers == ()
