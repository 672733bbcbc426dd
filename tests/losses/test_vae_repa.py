"""VAE-REPA: loops, patches of latents in the order of the tokens."""

import pytest
import torch
from torch import nn

from alignlab.losses import build_objective
from alignlab.losses.grids import patch_tokens
from alignlab.losses.objective import LATENTS, Features, Tokens
from alignlab.losses.repa import repa_loss
from alignlab.losses.vae_repa import VaeRepaConfig, vae_alignment_loss
from random_tensors import draw, draw_double, golden_pair


def test_a_golden_value_and_no_gradient_into_the_latents() -> None:
    student, latents = (x.clone().requires_grad_() for x in golden_pair(1, 6, 4))
    loss_B = vae_alignment_loss(student, latents)
    assert loss_B.item() == pytest.approx(-0.00094802, abs=5e-9)  # REPA's
    torch.autograd.backward(loss_B.sum())
    assert latents.grad is None and student.grad is not None


def test_it_agrees_with_loops_over_the_patches_in_value_and_gradient() -> None:
    """Of latents (B, C, T, H, W) whose token at (t, y, x) covers 2x3 places of each channel."""
    latents = draw_double(2, 2, 3, 4, 9, seed=1)
    student = draw_double(2, 3 * 2 * 3, 2 * 2 * 3).requires_grad_()
    loops = []
    for b in range(2):
        total, n = student.new_zeros(()), 0
        for t in range(3):
            for y in range(2):
                for x in range(3):
                    patch = [
                        latents[b, c, t, 2 * y + i, 3 * x + j]
                        for c in range(2)
                        for i in range(2)
                        for j in range(3)
                    ]
                    target = torch.stack(patch)
                    token = student[b, n]
                    total = total - torch.dot(token, target) / token.norm() / target.norm() / 18
                    n += 1
        loops.append(total)
    tokens_BTPD = patch_tokens(latents, (2, 3))
    assert tokens_BTPD.shape == (2, 3, 6, 12)
    ours, reference = vae_alignment_loss(student, tokens_BTPD.flatten(1, 2)), torch.stack(loops)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(reference.sum(), student)
    )


def test_a_patch_is_what_the_transformers_embedding_sees() -> None:
    """The same weights, as a convolution with stride and as a product with flattened patches."""
    latents = draw(1, 3, 2, 4, 6)
    embedding = nn.Conv3d(3, 5, (1, 2, 2), stride=(1, 2, 2), bias=False)
    expected = embedding(latents).flatten(2).mT
    found = patch_tokens(latents, (2, 2)).flatten(1, 2) @ embedding.weight.flatten(1).mT
    torch.testing.assert_close(found, expected)


def test_latents_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 4, 5\) do not divide into patches 2x2"):
        patch_tokens(draw(1, 2, 1, 4, 5), (2, 2))


def test_blocks_are_averaged_each_with_its_projector() -> None:
    config = VaeRepaConfig(blocks=(0, 2), projector_dim=8)
    objective = build_objective(config, student_dim=5, teacher_dims={}, latents_dim=4)
    tokens = {b: Tokens(draw(2, 6, 5, seed=b), (3, 1, 2)) for b in (0, 2)}
    latents = Features(draw(2, 3, 2, 4, seed=9), (3, 1, 2))
    terms = objective(tokens, {LATENTS: latents})
    per_block = [
        repa_loss(
            objective.get_submodule(f"projectors.block_{b}")(tokens[b].tokens_BND),
            latents.tokens_BTPD.flatten(1, 2),
        )
        for b in (0, 2)
    ]
    torch.testing.assert_close(terms.loss_B, torch.stack(per_block).mean(0))


def test_latents_of_unknown_width_are_refused() -> None:
    with pytest.raises(ValueError, match="'vae_repa' reads clean latents: give latents_dim"):
        build_objective(VaeRepaConfig(), student_dim=5, teacher_dims={"dino": 3})
