"""SARA's Stage 2 and InfoNCE: golden values, loops, properties, both sources of saliency."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.losses.grids import match_grid, match_student
from alignlab.losses.motion_head import MotionHead, MotionHeadConfig
from alignlab.losses.objective import Context, Features, Grid, Tokens
from alignlab.losses.saliency_aligner import SaliencyAligner, SaliencyAlignerConfig
from alignlab.losses.sara import Sara, SaraConfig, info_nce, routed_relation_loss
from alignlab.losses.stage1_folder import Stage1Info, Stage1Teacher, save_stage1

K = torch.arange(1, 25, dtype=torch.float64).reshape(1, 3, 2, 4)
SINE, COSINE = torch.sin(K), torch.cos(K / 2)
SALIENCY = 0.5 * torch.sin(torch.arange(1, 7, dtype=torch.float64)).reshape(1, 3, 2) + 0.5
GRID, TEACHER_GRID = (3, 2, 2), (9, 2, 2)
TEACHER = Stage1Teacher(family="dinov2", path="somewhere", feature="post_norm")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_saliency(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


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
    given: dict[str, Any] = {"teacher": "clip", "blocks": (0,), "projector_dim": 7, **settings}
    if "aligner" not in given:
        given.setdefault("saliency", "masks")
    return Sara(SaraConfig(**given), student_dim=6, teacher_dims={"clip": 8, "dino": 4})


def inputs() -> tuple[dict[int, Tokens], dict[str, Features], Context]:
    student = {block: Tokens(draw(2, 12, 6, seed=block), GRID) for block in (0, 2)}
    teacher = {
        "clip": Features(draw(2, 9, 4, 8, seed=7), TEACHER_GRID),
        "dino": Features(draw(2, 9, 4, 4, seed=8), TEACHER_GRID),
    }
    text_BLD = draw(2, 5, 6, seed=3)
    text_BLD[1, 3:] = 0.0
    return student, teacher, Context(text_BLD, draw_saliency(2, 9, 6, 6) < 0.4)


def by_loops(
    student_TPD: Tensor,
    teacher_TPD: Tensor,
    saliency_TP: Tensor,
    routing: str,
    tau: float,
    temporal_weight: float,
) -> Tensor:
    """Visits every ordered pair of tokens of one sample, one at a time."""
    tops: list[Any] = [0.0, 0.0]
    bottoms = [1e-6, 1e-6]
    places = list(itertools.product(range(student_TPD.shape[0]), range(student_TPD.shape[1])))
    for one, other in itertools.product(places, places):
        a, b = float(saliency_TP[one]), float(saliency_TP[other])
        weight = {"or": 1 - (1 - a) * (1 - b), "and": a * b, "xor": abs(a - b), "uniform": 1.0}
        apart = abs(one[0] - other[0])
        share = weight[routing] * math.exp(-apart / tau)
        gap = F.cosine_similarity(student_TPD[one], student_TPD[other], dim=0) - (
            F.cosine_similarity(teacher_TPD[one], teacher_TPD[other], dim=0)
        )
        tops[apart > 0] = tops[apart > 0] + share * (gap.abs() if one != other else gap * 0.0)
        bottoms[apart > 0] += share
    total: Tensor = tops[0] / bottoms[0] + temporal_weight * tops[1] / bottoms[1]
    return total


@pytest.mark.parametrize("impl", ["auto", "eager", "chunked"])
@pytest.mark.parametrize(
    ("setting", "golden"),
    [
        pytest.param({}, 0.17661906 + 0.39903824, id="or"),
        pytest.param({"tau": 10.0}, 0.17661906 + 0.39032765, id="or_tau_10"),
        pytest.param({"routing": "and"}, 0.11226164 + 0.40853719, id="and"),
        pytest.param({"routing": "xor"}, 0.43517856 + 0.41090840, id="xor"),
        pytest.param({"routing": "uniform"}, 0.17730709 + 0.36529237, id="uniform"),
        pytest.param({"temporal_weight": 0.0}, 0.17661906, id="spatial_only"),
    ],
)
def test_reproduces_the_golden_values(impl: Any, setting: dict[str, Any], golden: float) -> None:
    loss_B = routed_relation_loss(SINE, COSINE, SALIENCY, impl=impl, **setting)
    assert loss_B.shape == (1,) and loss_B.dtype == torch.float64
    assert loss_B.item() == pytest.approx(golden, abs=1.5e-8)


@pytest.mark.parametrize("impl", ["eager", "chunked"])
@pytest.mark.parametrize(
    ("routing", "tau", "temporal_weight"),
    [("or", math.inf, 1.0), ("or", 2.0, 0.3), ("and", 2.0, 1.0), ("xor", 1.0, 2.0)],
)
def test_values_and_gradients_equal_a_loop_over_pairs(
    impl: Any, routing: Any, tau: float, temporal_weight: float
) -> None:
    student, teacher = draw(2, 3, 5, 7).double().requires_grad_(), draw(2, 3, 5, 3, seed=1).double()
    saliency = draw_saliency(2, 3, 5).double()
    loss_B = routed_relation_loss(
        student,
        teacher,
        saliency,
        routing=routing,
        tau=tau,
        temporal_weight=temporal_weight,
        impl=impl,
    )
    for sample in range(2):
        expected = by_loops(
            student[sample], teacher[sample], saliency[sample], routing, tau, temporal_weight
        )
        torch.testing.assert_close(loss_B[sample], expected)
        have, want = (
            torch.autograd.grad(value, student, retain_graph=True)
            for value in (loss_B[sample], expected)
        )
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("routing", ["or", "and"])
def test_constant_saliency_is_no_saliency(routing: Any) -> None:
    student, teacher = draw(2, 3, 5, 7).double(), draw(2, 3, 5, 7, seed=1).double()
    ones = torch.ones(2, 3, 5, dtype=torch.float64)
    uniform = routed_relation_loss(student, teacher, ones, routing="uniform")
    for constant in (0.2, 1.0):
        routed = routed_relation_loss(student, teacher, constant * ones, routing=routing)
        torch.testing.assert_close(routed, uniform, atol=0, rtol=1e-5)


def test_and_sees_only_pairs_inside_the_salient_tokens() -> None:
    student, teacher = draw(1, 3, 5, 7), draw(1, 3, 5, 7, seed=1)
    saliency = torch.zeros(1, 3, 5)
    saliency[:, :, :2] = 1.0
    elsewhere = torch.cat([student[:, :, :2], draw(1, 3, 3, 7, seed=2)], dim=2)
    for routing, blind in (("and", True), ("or", False), ("xor", False)):
        one, other = (
            routed_relation_loss(x, teacher, saliency, routing=routing)  # type: ignore[arg-type]
            for x in (student, elsewhere)
        )
        assert torch.allclose(one, other) == blind


def test_info_nce_reproduces_its_golden_value() -> None:
    loss_B = info_nce(SINE.reshape(6, 4), COSINE.reshape(6, 4))
    assert loss_B.shape == (6,) and loss_B.dtype == torch.float64
    assert loss_B.mean().item() == pytest.approx(11.88819613, abs=5e-9)


def test_info_nce_equals_a_loop_and_reaches_both_sides() -> None:
    visual, text = (
        draw(5, 7).double().requires_grad_(),
        draw(5, 7, seed=1).double().requires_grad_(),
    )
    expected = []
    for row in range(5):
        scores = [F.cosine_similarity(visual[row], text[j], dim=0) / 0.2 for j in range(5)]
        expected.append(torch.log(sum(torch.exp(s - scores[row]) for s in scores)))  # type: ignore[arg-type]
    loss_B = info_nce(visual, text, temperature=0.2)
    torch.testing.assert_close(loss_B, torch.stack(expected))
    assert torch.autograd.gradcheck(lambda v, t: info_nce(v, t, 0.2), (visual, text))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = info_nce(visual.float(), text.float(), temperature=0.2)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), loss_B, atol=1e-5, rtol=0)
    assert info_nce(visual[:1], text[:1]).item() == 0
    with pytest.raises(ValueError, match=r"are not \(B, D\) alike"):
        info_nce(visual, text[:4])


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


def test_config_defaults_are_the_papers() -> None:
    config = SaraConfig(teacher="clip", aligner="folder")
    assert (config.blocks, config.weight, config.routing) == ((17,), 0.5, "or")
    assert (config.tau, config.temporal_weight, config.projector_dim) == (None, 1.0, 2048)
    assert (config.saliency, config.grid) == ("aligner", "teacher")


@pytest.mark.parametrize("tau", [None, math.inf, "inf", 10.0])
def test_config_survives_json_also_without_decay(tau: Any) -> None:
    config = SaraConfig(teacher="clip", saliency="masks", tau=tau)
    assert config.tau == (10.0 if tau == 10.0 else None)
    assert SaraConfig.model_validate_json(config.model_dump_json()) == config
    assert SaraConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name the Stage 1 folder in `aligner`"),
        ({"aligner": ""}, "name the Stage 1 folder in `aligner`"),
        ({"saliency": "masks", "aligner": "folder"}, "`aligner` is never read"),
        ({"saliency": "masks", "routing": "nand"}, "routing"),
        ({"saliency": "masks", "tau": 0.0}, "tau"),
        ({"saliency": "masks", "tau": math.nan}, "tau"),
        ({"saliency": "masks", "temporal_weight": -1.0}, "temporal_weight"),
    ],
)
def test_config_refuses_what_has_no_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SaraConfig(teacher="clip", **settings)
