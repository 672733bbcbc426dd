"""SARA's Stage 2 objective: both sources of saliency, grids, blocks and the frozen aligner."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.kernels.relation import Routing, pair_weight
from alignlab.losses.grids import match_grid, match_student
from alignlab.losses.objective import Context, Features, Grid, Tokens
from alignlab.losses.sara import Sara, SaraConfig, decided_relation, routed_relation_loss
from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher, save_stage1
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from alignlab.losses.stage1.saliency_aligner import SaliencyAligner, SaliencyAlignerConfig
from random_tensors import draw

GRID, TEACHER_GRID = (3, 2, 2), (9, 2, 2)
TEACHER = Stage1Teacher(family="dinov2", path="somewhere", feature="post_norm")


def save(folder: Path, seed: int = 0, teacher_dim: int = 8) -> SaliencyAligner:
    shape = SaliencyAlignerConfig(
        teacher_dim=teacher_dim, text_dim=6, heads=2, hidden=8, embed_dim=4
    )
    module = SaliencyAligner(shape, seed=seed)
    info = Stage1Info(
        kind="sara",
        teacher=TEACHER,
        teacher_dim=teacher_dim,
        grid=(2, 2),
        text="somewhere",
        module=shape,
    )
    folder.mkdir(exist_ok=True)
    save_stage1(folder, module, info)
    return module


def build(**settings: Any) -> Sara:
    config: dict[str, Any] = {"teacher": "clip", "blocks": (0,), "projector_dim": 7, **settings}
    if "aligner" not in config:
        config.setdefault("saliency", "masks")
    return Sara(SaraConfig(**config), student_dim=6, teacher_dims={"clip": 8, "dino": 4})


def inputs() -> tuple[dict[int, Tokens], dict[str, Features], Context]:
    student = {block: Tokens(draw(2, 12, 6, seed=block), GRID) for block in (0, 2)}
    teacher = {
        "clip": Features(draw(2, 9, 4, 8, seed=7), TEACHER_GRID),
        "dino": Features(draw(2, 9, 4, 4, seed=8), TEACHER_GRID),
    }
    text_BLD = draw(2, 5, 6, seed=3)
    text_BLD[1, 3:] = 0.0
    masks_BTHW = torch.rand(2, 9, 6, 6, generator=torch.Generator().manual_seed(5))
    return student, teacher, Context(text_BLD, masks_BTHW < 0.4)


def test_masks_are_the_saliency_on_the_teachers_grid() -> None:
    objective = build()
    assert objective.needs == {"masks"}
    student, teacher, context = inputs()
    assert context.masks_BTHW is not None
    saliency = context.masks_BTHW.float().unflatten(2, (2, 3)).unflatten(4, (2, 3)).mean((3, 5))
    projected = objective.projectors["block_0"](student[0].tokens_BND)
    expected = routed_relation_loss(
        match_student(projected, GRID, TEACHER_GRID),
        teacher["clip"].tokens_BTPD,
        saliency.flatten(2),
    )
    terms = objective(student, teacher, context)
    torch.testing.assert_close(terms.loss_B, expected)
    torch.testing.assert_close(terms.parts["spatial"] + terms.parts["temporal"], expected)
    assert terms.similarity_B is None


def test_the_students_grid_averages_teacher_and_saliency() -> None:
    objective = build(grid="student")
    student, teacher, context = inputs()
    assert context.masks_BTHW is not None
    saliency = context.masks_BTHW.float().unflatten(2, (2, 3)).unflatten(4, (2, 3)).mean((3, 5))
    saliency = saliency.flatten(2)
    grouped = torch.stack([saliency[:, 0], saliency[:, 1:5].mean(1), saliency[:, 5:].mean(1)], 1)
    expected = routed_relation_loss(
        objective.projectors["block_0"](student[0].tokens_BND).unflatten(1, (3, 4)),
        match_grid(teacher["clip"].tokens_BTPD, TEACHER_GRID, GRID),
        grouped,
    )
    torch.testing.assert_close(objective(student, teacher, context).loss_B, expected)


@pytest.mark.parametrize("teacher_grid", [(4, 2, 2), (9, 3, 3), (3, 4, 4)])
@pytest.mark.parametrize("grid", ["student", "teacher"])
def test_any_teacher_grid_meets_its_masks(teacher_grid: Grid, grid: str) -> None:
    frames, height, width = teacher_grid
    student, _, context = inputs()
    tokens = draw(2, frames, height * width, 8, seed=4)
    terms = build(grid=grid)(student, {"clip": Features(tokens, teacher_grid)}, context)
    assert terms.loss_B.shape == (2,) and torch.isfinite(terms.loss_B).all()


def test_the_aligner_is_asked_about_the_caption_and_stays_frozen(tmp_path: Path) -> None:
    module = save(tmp_path)
    objective = build(aligner=str(tmp_path))
    assert objective.needs == {"text"}
    student, teacher, context = inputs()
    assert context.text_BLD is not None
    projected = objective.projectors["block_0"](student[0].tokens_BND)
    expected = routed_relation_loss(
        match_student(projected, GRID, TEACHER_GRID),
        teacher["clip"].tokens_BTPD,
        module.saliency(teacher["clip"].tokens_BTPD, context.text_BLD),
    )
    terms = objective(student, teacher, context)
    torch.testing.assert_close(terms.loss_B, expected)
    torch.autograd.backward(terms.loss_B.sum())
    assert objective.aligner is not None
    assert all(not p.requires_grad and p.grad is None for p in objective.aligner.parameters())
    trainable = [p for p in objective.parameters() if p.requires_grad]
    assert len(trainable) == 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    other_text = Context(context.text_BLD.flip(0), None)
    assert not torch.allclose(objective(student, teacher, other_text).loss_B, expected)


def test_bfloat16_tokens_and_text_pass_through_the_aligner(tmp_path: Path) -> None:
    save(tmp_path)
    objective = build(aligner=str(tmp_path))
    student, teacher, context = inputs()
    assert context.text_BLD is not None
    exact = objective(student, teacher, context).loss_B
    rounded = objective(
        {b: Tokens(x.tokens_BND.bfloat16(), x.grid) for b, x in student.items()},
        {a: Features(x.tokens_BTPD.bfloat16(), x.grid) for a, x in teacher.items()},
        Context(context.text_BLD.bfloat16()),
    ).loss_B
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=1e-2, rtol=0)


def test_uniform_routing_needs_no_saliency(tmp_path: Path) -> None:
    student, teacher, context = inputs()
    objectives = [
        build(routing="uniform"),
        build(routing="uniform", saliency="aligner"),
        build(routing="uniform", aligner=str(tmp_path / "never_read")),
    ]
    values = [objective(student, teacher).loss_B for objective in objectives]
    assert all(objective.needs == frozenset() for objective in objectives)
    assert all(torch.equal(value, values[0]) for value in values)
    assert not torch.allclose(build()(student, teacher, context).loss_B, values[0])


def test_a_stage_1_of_another_width_or_kind_is_refused(tmp_path: Path) -> None:
    save(tmp_path, teacher_dim=10)
    with pytest.raises(ValueError, match="reads teacher tokens of width 10, clip has 8"):
        build(aligner=str(tmp_path))
    shape = MotionHeadConfig(teacher_dim=8, width=4, hidden=4, decoder=4)
    info = Stage1Info(kind="moalign", teacher=TEACHER, teacher_dim=8, grid=(2, 2), module=shape)
    save_stage1(tmp_path, MotionHead(shape), info)
    with pytest.raises(ValueError, match="of moalign, not of sara"):
        build(aligner=str(tmp_path))


def test_every_setting_changes_the_loss(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        save(tmp_path / name, seed=seed)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    student, teacher, context = inputs()
    base = build(aligner=one)(student, teacher, context).loss_B
    for changed in (
        {"routing": "and"},
        {"routing": "uniform"},
        {"tau": 1.5},
        {"temporal_weight": 0.5},
        {"aligner": two},
        {"aligner": None, "saliency": "masks"},
        {"grid": "student"},
        {"projector_dim": 8},
        {"blocks": (2,)},
    ):
        value = build(**{"aligner": one, **changed})(student, teacher, context).loss_B
        assert not torch.allclose(value, base), changed
    masks = build()(student, teacher, context).loss_B
    assert not torch.allclose(build(teacher="dino")(student, teacher, context).loss_B, masks)


def test_blocks_are_averaged() -> None:
    student, teacher, context = inputs()
    objective = build(blocks=(0, 2))
    alone = []
    for block in (0, 2):
        single = build(blocks=(block,))
        single.projectors.load_state_dict(
            {
                name: value
                for name, value in objective.projectors.state_dict().items()
                if name.startswith(f"block_{block}.")
            }
        )
        alone.append(single(student, teacher, context).loss_B)
    both = objective(student, teacher, context).loss_B
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


def test_samples_with_empty_masks_are_not_aligned(tmp_path: Path) -> None:
    student, teacher, context = inputs()
    assert context.masks_BTHW is not None
    masks_BTHW = context.masks_BTHW.clone()
    masks_BTHW[0] = False
    empty = Context(context.text_BLD, masks_BTHW)
    for grid in ("student", "teacher"):
        terms = build(grid=grid)(student, teacher, empty)
        assert terms.loss_B[0] == 0 < terms.loss_B[1]
        assert terms.aligned_B is not None and terms.aligned_B.tolist() == [False, True]
    save(tmp_path)
    aligned_B = build(aligner=str(tmp_path))(student, teacher, empty).aligned_B
    assert aligned_B is not None and aligned_B.all()
    assert build(routing="uniform")(student, teacher).aligned_B is None


def with_undecided(context: Context) -> tuple[Context, Tensor]:
    """In sample 1 the last token of each frame is undecided, and one pixel of the first; and the
    saliency of the others, (B, T, 3)."""
    assert context.masks_BTHW is not None
    undecided_BTHW = torch.zeros_like(context.masks_BTHW)
    undecided_BTHW[1, :, 3:, 3:] = True
    undecided_BTHW[1, :, 1, 1] = True
    masks_BTHW = context.masks_BTHW & ~undecided_BTHW
    covered = masks_BTHW.float().unflatten(2, (2, 3)).unflatten(4, (2, 3)).sum((3, 5)).flatten(2)
    pixels = torch.full((2, 1, 3), 9.0)
    pixels[1, 0, 0] = 8.0
    found = Context(context.text_BLD, masks_BTHW, undecided_BTHW=undecided_BTHW)
    return found, covered[..., :3] / pixels


@pytest.mark.parametrize("routing", ["or", "and", "xor"])
def test_undecided_tokens_are_in_no_pair(routing: Routing) -> None:
    student, teacher, context = inputs()
    undecided, saliency_BTP = with_undecided(context)
    objective = build(routing=routing, tau=3.0)
    projected = objective.projectors["block_0"](student[0].tokens_BND)
    expected = routed_relation_loss(
        match_student(projected, GRID, TEACHER_GRID)[:, :, :3],
        teacher["clip"].tokens_BTPD[:, :, :3],
        saliency_BTP,
        routing=routing,
        tau=3.0,
    )
    terms = objective(student, teacher, undecided)
    torch.testing.assert_close(terms.loss_B[1], expected[1])
    # the sample without any has the very bits that it has elsewhere
    known = Context(context.text_BLD, undecided.masks_BTHW)
    assert torch.equal(terms.loss_B[0], objective(student, teacher, known).loss_B[0])
    terms.loss_B.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("routing", ["or", "and", "xor"])
@pytest.mark.parametrize("tau", [math.inf, 2.0])
def test_decided_relations_are_what_plain_loops_find(routing: Routing, tau: float) -> None:
    student, teacher = draw(1, 3, 4, 5, seed=1).double(), draw(1, 3, 4, 6, seed=2).double()
    saliency = draw(1, 3, 4, seed=3).double().sigmoid()
    undecided = torch.tensor([[[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]]).bool()
    found = decided_relation(
        student, teacher, saliency, undecided, routing=routing, tau=tau, impl="eager"
    )
    sums, weights = [0.0] * 3, [0.0] * 3
    places = [(t, p) for t in range(3) for p in range(4) if not undecided[0, t, p]]
    for one, other in product(places, places):
        gap = 0.0
        if one != other:
            cosines = [
                torch.cosine_similarity(x[0][one], x[0][other], dim=0) for x in (student, teacher)
            ]
            gap = float((cosines[0] - cosines[1]).abs())
        apart = abs(one[0] - other[0])
        weight = float(pair_weight(saliency[0][one], saliency[0][other], routing))
        decay = math.exp(-apart / tau) if apart else 0.0
        for number, factor in enumerate((float(apart == 0), decay, 1.0)):
            sums[number] += weight * factor * gap
            weights[number] += weight * factor
    for number, mean in enumerate(found):
        assert float(mean) == pytest.approx(sums[number] / (weights[number] + 1e-6), rel=1e-6)


def test_a_sample_whose_entities_are_all_undecided_is_not_aligned() -> None:
    student, teacher, context = inputs()
    assert context.masks_BTHW is not None
    masks_BTHW, undecided_BTHW = context.masks_BTHW.clone(), torch.zeros(2, 9, 6, 6).bool()
    undecided_BTHW[0], masks_BTHW[0] = True, False
    for grid in ("student", "teacher"):
        terms = build(grid=grid)(
            student, teacher, Context(None, masks_BTHW, undecided_BTHW=undecided_BTHW)
        )
        assert terms.loss_B[0] == 0 < terms.loss_B[1]
        assert terms.aligned_B is not None and terms.aligned_B.tolist() == [False, True]
