"""Centred tokens and differences of frames, in every objective by the cosine of matching tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from alignlab.errors import UserError
from alignlab.losses import build_objective
from alignlab.losses.crepa import CrepaConfig
from alignlab.losses.objective import Features, Terms, Tokens, self_key
from alignlab.losses.refalign import RefAlign, RefAlignConfig
from alignlab.losses.registry import BUILT_IN
from alignlab.losses.repa import repa_loss
from alignlab.losses.sra import SraConfig
from alignlab.losses.token_cosine import TokenCosineSettings, centered, frame_differences
from alignlab.recipe import load_run
from random_tensors import draw, draw_double

GRID, WIDTH = (3, 2, 3), 5
NAMES = [name for name, row in BUILT_IN.items() if issubclass(row.Config, TokenCosineSettings)]


def by_loops(student: Tensor, teacher: Tensor, *, differences: bool) -> list[float]:
    """Minus the mean cosine of what is compared, one sample and token after the other."""
    losses = []
    for sides in zip(student, teacher, strict=True):  # (T, P, D) each
        compared = []
        for side in sides:
            if differences:
                rows = [side[t + 1, p] - side[t, p] for t in range(len(side) - 1) for p in range(6)]
            else:
                tokens = [token for frame in side for token in frame]
                mean = sum(tokens) / len(tokens)
                rows = [token - mean for token in tokens]
            compared.append(rows)
        cosines = [float(s @ t / (s.norm() * t.norm())) for s, t in zip(*compared, strict=True)]
        losses.append(-sum(cosines) / len(cosines))
    return losses


@pytest.mark.parametrize("differences", [False, True])
def test_values_are_those_of_the_formula(differences: bool) -> None:
    student, teacher = draw(2, 3, 6, WIDTH, seed=0) + 2, draw(2, 3, 6, WIDTH, seed=1) - 1
    settings = TokenCosineSettings(centered=not differences, temporal_difference=differences)
    sides = (settings.compared(x).flatten(1, 2) for x in (student, teacher))
    assert repa_loss(*sides).tolist() == pytest.approx(
        by_loops(student, teacher, differences=differences), abs=1e-6
    )


def test_the_mean_gets_no_gradient() -> None:
    tokens = draw(2, 6, WIDTH, seed=0).requires_grad_()
    (gradient,) = torch.autograd.grad(centered(tokens).square().sum(), tokens)
    torch.testing.assert_close(gradient, 2 * centered(tokens.detach()))
    (gradient,) = torch.autograd.grad(centered(tokens).sum(), tokens)
    assert torch.equal(gradient, torch.ones_like(tokens))  # 0 through the mean


def test_tokens_that_do_not_count_are_in_no_mean() -> None:
    tokens = draw(2, 6, WIDTH, seed=0)
    valid = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    expected = tokens[0] - tokens[0, :4].mean(0)
    torch.testing.assert_close(centered(tokens, valid)[0], expected)
    assert torch.equal(centered(tokens, valid)[1], tokens[1])


def terms_of(name: str, *, common: float = 0.0, frames: int = 3, **settings: Any) -> Terms:
    """An objective without projectors, on tokens that have `common` times one vector in common."""
    grid = (frames, *GRID[1:])
    reads = BUILT_IN[name].reads
    chosen: dict[str, Any] = {"name": name, "blocks": (0,), **settings}
    if reads == "teacher":
        chosen["teacher"] = ("dino", "clip") if name == "m2_repa" else "dino"
    if name in ("layersync", "sra", "self_flow"):
        chosen["deep_blocks"] = (1,)
    config = BUILT_IN[name].Config(**chosen)
    objective = build_objective(
        config, student_dim=WIDTH, teacher_dims={"dino": WIDTH, "clip": WIDTH}, latents_dim=WIDTH
    )
    for holders in (getattr(objective, part, {}) for part in ("projectors", "heads")):
        for key, holder in list(holders.items()):
            holders[key] = _identity(holder)
    shared = common * draw(WIDTH, seed=7)
    student = {b: draw(2, frames * 6, WIDTH, seed=b) + shared for b in (0, 1)}
    tokens = draw(2, frames, 6, WIDTH, seed=2) + shared
    features = dict.fromkeys(("dino", "clip", "latents", self_key(1)), Features(tokens, grid))
    terms: Terms = objective({b: Tokens(x, grid) for b, x in student.items()}, features)
    return terms


def _identity(like: torch.nn.Module) -> torch.nn.Module:
    if isinstance(like, torch.nn.Conv2d):
        same = torch.nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        weight = torch.eye(WIDTH)[:, :, None, None]
    else:
        same = torch.nn.Linear(WIDTH, WIDTH, bias=False)  # type: ignore[assignment]
        weight = torch.eye(WIDTH)
    same.weight.data.copy_(weight)
    return same


def test_these_objectives_have_the_settings() -> None:
    expected = {"repa", "irepa", "align4gen", "crepa", "vae_repa", "layersync", "sra"}
    assert expected | {"m2_repa", "self_flow"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_all_tokens_share_agrees_in_the_plain_cosine_alone(name: str) -> None:
    more = {"spatial_norm": False} if name == "irepa" else {}
    far = terms_of(name, common=30.0, **more)
    near = terms_of(name, **more)
    assert far.similarity_B is not None and near.similarity_B is not None
    assert far.centered_B is not None and near.centered_B is not None
    assert (far.similarity_B > 0.9).all() and (near.similarity_B < 0.5).all()
    torch.testing.assert_close(far.centered_B, near.centered_B, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_change_what_is_trained_and_not_what_is_logged(name: str) -> None:
    plain = terms_of(name, common=1.0)
    assert plain.similarity_B is not None and plain.centered_B is not None
    for setting in ("centered", "temporal_difference"):
        terms = terms_of(name, common=1.0, **{setting: True})
        assert terms.similarity_B is not None and terms.centered_B is not None
        torch.testing.assert_close(terms.similarity_B, plain.similarity_B)
        torch.testing.assert_close(terms.centered_B, plain.centered_B)
        assert not torch.allclose(terms.loss_B, plain.loss_B, atol=1e-3)
        assert terms.watched_B is not None
        if setting == "centered":
            torch.testing.assert_close(terms.watched_B, plain.centered_B)
        if name not in ("crepa", "m2_repa"):  # whose losses have neighbours, and heads, as well
            torch.testing.assert_close(terms.watched_B, -terms.loss_B.detach())


@pytest.mark.parametrize("name", NAMES)
def test_differences_of_one_frame_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^temporal_difference compares a frame .* there is one$"):
        terms_of(name, frames=1, temporal_difference=True)
    assert frame_differences(draw(1, 2, 3, 4, seed=0)).shape == (1, 1, 3, 4)


def test_settings_without_meaning_are_refused() -> None:
    both: dict[str, Any] = {"centered": True, "temporal_difference": True}
    with pytest.raises(ValidationError, match="in no temporal_difference; remove one"):
        CrepaConfig(teacher="dino", **both)
    for setting in both:
        with pytest.raises(ValidationError, match=f"{setting}: is for the cosine, not for loss"):
            SraConfig(loss="smooth_l1", **{setting: both[setting]})


def test_reference_tokens_have_no_differences_in_time(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*temporal_difference[^\n]*$"):
        load_run(recipe_file, ["objectives.ra.temporal_difference=true"])


def test_refalign_logs_cosines_centred_over_tokens_with_a_subject() -> None:
    config = RefAlignConfig(teacher="dino", blocks=(0,))
    objective = RefAlign(config, student_dim=4, teacher_dims={"dino": 3})
    tokens, teacher = draw(3, 6, 4, seed=0) + 1, draw(3, 2, 3, 3, seed=1) + 1
    ids_BN = torch.tensor([[0] * 3 + [1] * 3, [0] * 3 + [-1] * 3, [-1] * 6])
    tapped = Tokens(tokens, (2, 1, 3), ids_BN)
    with torch.no_grad():
        terms: Terms = objective({0: tapped}, {"dino": Features(teacher, (2, 1, 3))})
        projected = objective.projectors["block_0"](tokens)
    expected = []
    for row, count in ((0, 6), (1, 3)):
        student, target = projected[row, :count], teacher[row].flatten(0, 1)[:count]
        sides = (student - student.mean(0), target - target.mean(0))
        expected.append(float(torch.nn.functional.cosine_similarity(*sides, dim=-1).mean()))
    assert terms.centered_B is not None
    assert terms.centered_B.tolist() == pytest.approx([*expected, 0.0], abs=1e-6)


def centred_gradient(student: Tensor, teacher: Tensor, *, settings: bool) -> Tensor:
    """Of REPA's loss of centred tokens, as the setting has it or as the formula stands."""
    student = student.requires_grad_()
    center = TokenCosineSettings(centered=True).compared if settings else plainly_centered
    loss = repa_loss(center(student).flatten(1, 2), center(teacher).flatten(1, 2)).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient


def plainly_centered(tokens_BTPD: Tensor) -> Tensor:
    return centered(tokens_BTPD.flatten(1, 2)).view(tokens_BTPD.shape)


def test_tokens_that_are_nearly_alike_have_no_gradient_without_bound() -> None:
    """By the share of its length that is left of a token; from a cosine's there is no bound."""
    drawn, teacher = draw_double(2, 1, 3, 6, WIDTH)
    shared = torch.ones(WIDTH, dtype=torch.float64)
    for student in (2 * shared + drawn, shared + 1e-6 * drawn):
        plain, ours = (
            centred_gradient(student.clone(), teacher, settings=x) for x in (False, True)
        )
        moved = plainly_centered(student).norm(dim=-1, keepdim=True)
        share = (moved / student.norm(dim=-1, keepdim=True)).clamp_max(1.0)
        scaled = plain_of_tokens(student, teacher, share)
        torch.testing.assert_close(ours, scaled, rtol=1e-9, atol=1e-12)
    assert plain.norm() > 1e4 > 10 > ours.norm()


def plain_of_tokens(student: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
    """The gradient of minus the mean cosine, token by token, times what is left of each."""
    left, target = plainly_centered(student).requires_grad_(), plainly_centered(teacher)
    loss = -torch.nn.functional.cosine_similarity(left, target, -1).mean()
    (gradient,) = torch.autograd.grad(loss, left)
    return gradient * share
