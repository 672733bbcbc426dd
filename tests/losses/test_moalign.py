"""MoAlign's Stage 2: golden values, loops, properties, and the frozen motion head."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.kernels.relation import relation_distance
from alignlab.losses.grids import match_grid, match_student
from alignlab.losses.moalign import MoAlign, MoAlignConfig, motion_relation_loss
from alignlab.losses.objective import Features, Tokens
from alignlab.losses.projector import deep_projector
from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher, save_stage1
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from random_tensors import draw, golden_pair

SINE, COSINE = golden_pair(1, 3, 2, 4)
GRID, TEACHER_GRID = (3, 2, 2), (9, 2, 2)


def save(folder: Path, seed: int = 0, width: int = 3, teacher_dim: int = 8) -> MotionHead:
    shape = MotionHeadConfig(teacher_dim=teacher_dim, width=width, hidden=5, decoder=4)
    module = MotionHead(shape, seed=seed)
    teacher = Stage1Teacher(family="dinov2", path="somewhere", feature="post_norm")
    info = Stage1Info(
        kind="moalign", teacher=teacher, teacher_dim=teacher_dim, grid=(2, 2), module=shape
    )
    folder.mkdir(exist_ok=True)
    save_stage1(folder, module, info)
    return module


def build(folder: Path, **settings: Any) -> MoAlign:
    config = {
        "teacher": "clip",
        "blocks": (0,),
        "projector_dim": 7,
        "head": str(folder),
        **settings,
    }
    teacher_dims = {"clip": 8, "other": 8, "dino": 4}
    return MoAlign(MoAlignConfig(**config), student_dim=6, teacher_dims=teacher_dims)


def inputs() -> tuple[dict[int, Tokens], dict[str, Features]]:
    student = {block: Tokens(draw(2, 12, 6, seed=block), GRID) for block in (0, 2)}
    teacher = {
        "clip": Features(draw(2, 9, 4, 8, seed=7), TEACHER_GRID),
        "other": Features(draw(2, 9, 4, 8, seed=8), TEACHER_GRID),
    }
    return student, teacher


def by_loops(student_TPD: Tensor, motion_TPD: Tensor, tau: float) -> Tensor:
    """Visits every ordered pair of tokens, one at a time, and takes plain means."""
    within: list[Tensor] = []
    across: list[Tensor] = []
    places = list(itertools.product(range(student_TPD.shape[0]), range(student_TPD.shape[1])))
    for one, other in itertools.product(places, places):
        gap = F.cosine_similarity(student_TPD[one], student_TPD[other], dim=0) - (
            F.cosine_similarity(motion_TPD[one], motion_TPD[other], dim=0)
        )
        apart = abs(one[0] - other[0])
        pair = gap.abs() * math.exp(-apart / tau) if one != other else gap * 0.0
        (across if apart else within).append(pair)
    return torch.stack(within).mean() + torch.stack(across).mean()


@pytest.mark.parametrize("impl", ["auto", "eager", "chunked"])
def test_reproduces_the_golden_values(impl: Any) -> None:
    """The spatial mean is that of the relations without margin; there is one row for both."""
    loss_B = motion_relation_loss(SINE, COSINE, impl=impl)
    assert loss_B.shape == (1,) and loss_B.dtype == torch.float64
    assert loss_B.item() == pytest.approx(0.17730710 + 0.31272914, abs=1e-8)
    weighted = relation_distance(SINE, COSINE, tau=10.0, impl=impl).temporal
    assert weighted.item() == pytest.approx(0.35694165, abs=2e-8)  # what it is not


@pytest.mark.parametrize("impl", ["eager", "chunked"])
@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_values_and_gradients_equal_a_loop_over_pairs(impl: Any, tau: float) -> None:
    student, motion = draw(2, 3, 5, 7).double().requires_grad_(), draw(2, 3, 5, 3, seed=1).double()
    loss_B = motion_relation_loss(student, motion, tau=tau, impl=impl)
    for sample in range(2):
        expected = by_loops(student[sample], motion[sample], tau)
        torch.testing.assert_close(loss_B[sample], expected)
        have, want = (
            torch.autograd.grad(value, student, retain_graph=True)
            for value in (loss_B[sample], expected)
        )
        torch.testing.assert_close(have, want)


def test_temporal_part_ignores_pairs_of_one_frame() -> None:
    """Frames in orthogonal channels: what happens inside one leaves the others' relations."""
    motion = draw(1, 2, 3, 6).double()
    student = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    student[:, 0, :, :4], student[:, 1, :, 4:] = draw(1, 3, 4), draw(1, 3, 4, seed=1)
    changed = student.clone()
    changed[:, 0, :, :4] = draw(1, 3, 4, seed=2)
    before, after = (relation_distance(x, motion, tau=10.0) for x in (student, changed))
    torch.testing.assert_close(after.temporal, before.temporal)
    assert not torch.allclose(after.spatial, before.spatial)
    difference = motion_relation_loss(changed, motion) - motion_relation_loss(student, motion)
    torch.testing.assert_close(difference, after.spatial - before.spatial, atol=1e-6, rtol=0)


def test_a_short_decay_leaves_the_spatial_part() -> None:
    spatial = relation_distance(SINE, COSINE).spatial
    loss_B = motion_relation_loss(SINE, COSINE, tau=1e-3)
    torch.testing.assert_close(loss_B, spatial, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="tau must be above 0"):
        motion_relation_loss(SINE, COSINE, tau=0.0)


def test_gradient_reaches_the_student_only() -> None:
    student, motion = SINE.clone().requires_grad_(), COSINE.clone().requires_grad_()
    torch.autograd.backward(motion_relation_loss(student, motion).sum())
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert motion.grad is None


def test_student_is_compared_with_the_motion_of_the_teacher(tmp_path: Path) -> None:
    head = save(tmp_path)
    objective = build(tmp_path)
    student, teacher = inputs()
    motion = head.motion(teacher["clip"].tokens_BTPD, TEACHER_GRID)
    projected = objective.projectors["block_0"](student[0].tokens_BND)
    assert projected.shape[-1] == motion.shape[-1] == 3
    expected = motion_relation_loss(match_student(projected, GRID, TEACHER_GRID), motion)
    terms = objective(student, teacher)
    torch.testing.assert_close(terms.loss_B, expected)
    torch.testing.assert_close(terms.parts["spatial"] + terms.parts["temporal"], expected)
    assert terms.similarity_B is None
    torch.autograd.backward(terms.loss_B.sum())
    assert all(not p.requires_grad and p.grad is None for p in objective.head.parameters())
    trainable = [p for p in objective.parameters() if p.requires_grad]
    assert len(trainable) == 8
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)


def test_the_students_grid_averages_the_motion(tmp_path: Path) -> None:
    head = save(tmp_path)
    objective = build(tmp_path, grid="student", tau=2.0)
    student, teacher = inputs()
    motion = head.motion(teacher["clip"].tokens_BTPD, TEACHER_GRID)
    expected = motion_relation_loss(
        objective.projectors["block_0"](student[0].tokens_BND).unflatten(1, (3, 4)),
        match_grid(motion, TEACHER_GRID, GRID),
        tau=2.0,
    )
    torch.testing.assert_close(objective(student, teacher).loss_B, expected)


def test_every_setting_changes_the_loss(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    save(one)
    save(two, seed=1)
    student, teacher = inputs()
    base = build(one)(student, teacher).loss_B
    for changed in (
        {"head": str(two)},
        {"tau": 1.0},
        {"grid": "student"},
        {"projector_dim": 8},
        {"blocks": (2,)},
        {"blocks": (0, 2)},
        {"teacher": "other"},
    ):
        value = build(one, **changed)(student, teacher).loss_B
        assert not torch.allclose(value, base), changed


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match="reads teacher tokens of width 8, dino has 4"):
        build(tmp_path, teacher="dino")


def test_a_folder_without_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`alignlab stage1 moalign RECIPE` makes one"):
        build(tmp_path)


def test_projector_has_four_layers_drawn_like_repas() -> None:
    projector = deep_projector(1536, 64, 2048, torch.Generator().manual_seed(0))
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    shapes = [tuple(layer.weight.shape) for layer in linears]
    assert shapes == [(2048, 1536), (2048, 2048), (2048, 2048), (64, 2048)]
    assert [type(layer) for layer in projector] == [nn.Linear, nn.SiLU] * 3 + [nn.Linear]
    assert all((layer.bias == 0).all() for layer in linears)
    bound = (6 / (1536 + 2048)) ** 0.5
    assert linears[0].weight.abs().max().item() == pytest.approx(bound, rel=1e-3)


def test_config_defaults_are_the_papers() -> None:
    config = MoAlignConfig(teacher="clip", head="folder")
    assert (config.blocks, config.weight, config.tau) == ((17,), 0.5, 10.0)
    assert (config.projector_dim, config.grid) == (2048, "teacher")
    assert MoAlignConfig.model_validate_json(config.model_dump_json()) == config
    for wrong in ({"tau": 0.0}, {"tau": math.inf}, {"head": ""}, {"grid": "both"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MoAlignConfig.model_validate({"teacher": "clip", "head": "folder", **wrong})
    with pytest.raises(ValueError, match="head"):
        MoAlignConfig(teacher="clip")  # type: ignore[call-arg]
