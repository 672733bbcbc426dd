"""What every objective owes the harness. A new objective adds one row to ROWS."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import alignlab.losses
from alignlab.losses import OBJECTIVES, build_objective
from alignlab.losses.objective import Features, Objective, ObjectiveConfig, Terms, Tokens
from alignlab.losses.refalign import reference_alignment_loss
from alignlab.losses.repa import repa_loss

TEACHER_DIMS = {"dino": 5, "clip": 7}
STUDENT_DIM, TEACHER_SIZES = 6, {"dino": 2, "clip": 4}
BLOCKS = (0, 1, 2)
READ_BY_HARNESS = {"name", "weight", "schedule", "gate"}


@dataclass(frozen=True)
class Row:
    """One objective: small settings, another value of every setting, and its bare formula."""

    name: str
    settings: dict[str, Any]
    changes: dict[str, Any]
    formula: Callable[[Tensor, Tensor, Tensor], Tensor]
    naive: Callable[[Tensor, Tensor, Tensor], Tensor]


def naive_refalign(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    sim_BNN = F.normalize(student_BND, dim=-1) @ F.normalize(teacher_BND, dim=-1).mT
    cross_BNN = ids_BN[:, :, None] != ids_BN[:, None, :]
    pull_B = (1 - sim_BNN.diagonal(dim1=1, dim2=2)).mean(1)
    return pull_B + (sim_BNN.relu() * cross_BNN).sum((1, 2)) / cross_BNN.sum((1, 2))


def naive_repa(student_BND: Tensor, teacher_BND: Tensor, ids_BN: Tensor) -> Tensor:
    return -(F.normalize(student_BND, dim=-1) * F.normalize(teacher_BND, dim=-1)).sum(-1).mean(1)


ROWS = [
    Row(
        name="refalign",
        settings={"teacher": "dino", "blocks": (0, 1)},
        changes={
            "blocks": (0,),
            "teacher": "clip",
            "neg_weight": 0.5,
            "pos_margin": 0.4,
            "neg_margin": 0.8,
        },
        formula=lambda s, t, ids: reference_alignment_loss(s, t, ids)[0],
        naive=naive_refalign,
    ),
    Row(
        name="repa",
        settings={"teacher": ("dino", "clip"), "blocks": (1, 2), "projector_dim": 9},
        changes={"blocks": (2,), "teacher": "dino", "projector_dim": 8},
        formula=lambda s, t, ids: repa_loss(s, t),
        naive=naive_repa,
    ),
]
every_objective = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@dataclass(frozen=True)
class OneSample:
    """Tokens (T, P, D) by block and by teacher; T counts video frames or references."""

    student: dict[int, Tensor]
    teacher: dict[str, Tensor]


def samples_for(row: Row) -> list[OneSample]:
    """Draws four samples; with references, they have 3, 1, 0 and 2 of them."""
    generator = torch.Generator().manual_seed(0)
    reference = OBJECTIVES[row.name].tokens == "reference"

    def draw(frames: int, tokens: int, width: int) -> Tensor:
        return torch.randn(frames, tokens, width, generator=generator)

    drawn = []
    for count in (3, 1, 0, 2):
        frames = count if reference else 3
        teacher_frames = count if reference else 5
        drawn.append(
            OneSample(
                {block: draw(frames, 4, STUDENT_DIM) for block in BLOCKS},
                {
                    alias: draw(teacher_frames, TEACHER_SIZES[alias] ** 2, TEACHER_DIMS[alias])
                    for alias in TEACHER_DIMS
                },
            )
        )
    return drawn


def padded(tokens: list[Tensor], frames: int) -> Tensor:
    """Stacks (T, P, D) of different T, filling the rest with numbers that must not matter."""
    return torch.stack(
        [
            torch.cat([x, torch.full((frames - len(x), *x.shape[1:]), 1e3)])
            if len(x) < frames
            else x
            for x in tokens
        ]
    )


def collate(samples: list[OneSample]) -> tuple[dict[int, Tokens], dict[str, Features]]:
    counts = torch.tensor([len(sample.student[0]) for sample in samples])
    frames = int(counts.max())
    # Rising ids for the references that a sample has, -1 for the others; each covers 4 tokens.
    ids_BK = torch.arange(frames).expand(len(samples), frames)
    ids_BN = ids_BK.where(ids_BK < counts[:, None], -1).repeat_interleave(4, dim=1)
    student = {
        block: Tokens(
            padded([sample.student[block] for sample in samples], frames).flatten(1, 2),
            (frames, 2, 2),
            ids_BN,
        )
        for block in BLOCKS
    }
    teacher = {}
    for alias, size in TEACHER_SIZES.items():
        per_sample = [sample.teacher[alias] for sample in samples]
        teacher_frames = max(len(x) for x in per_sample)
        teacher[alias] = Features(padded(per_sample, teacher_frames), (teacher_frames, size, size))
    return student, teacher


def build(row: Row, seed: int = 0, **changed: Any) -> Objective:
    config = OBJECTIVES[row.name].Config(**{**row.settings, **changed})
    return build_objective(config, student_dim=STUDENT_DIM, teacher_dims=TEACHER_DIMS, seed=seed)


def run(objective: Objective, samples: list[OneSample]) -> Terms:
    terms = objective(*collate(samples))
    assert isinstance(terms, Terms)
    return terms


def test_every_objective_has_a_row_and_a_readme_section() -> None:
    assert [row.name for row in ROWS] == list(OBJECTIVES)
    readme = (Path(alignlab.losses.__file__).parent / "README.md").read_text()
    for name in OBJECTIVES:
        assert f"\n## `{name}`" in readme


@every_objective
def test_class_is_final_and_its_config_carries_its_name(row: Row) -> None:
    objective_class = OBJECTIVES[row.name]
    assert getattr(objective_class, "__final__", False)
    assert objective_class.Config.model_fields["name"].default == row.name
    assert issubclass(objective_class.Config, ObjectiveConfig)


@every_objective
def test_gives_one_finite_value_per_sample(row: Row) -> None:
    terms = run(build(row), samples_for(row))
    assert terms.loss_B.shape == (4,) and torch.isfinite(terms.loss_B).all()
    assert terms.loss_B.requires_grad and terms.parts
    for part in terms.parts.values():
        assert part.shape == (4,) and torch.isfinite(part).all() and not part.requires_grad
    if terms.similarity_B is not None:
        assert terms.similarity_B.shape == (4,) and not terms.similarity_B.requires_grad
        assert (terms.similarity_B.abs() <= 1).all()


@every_objective
def test_gradient_reaches_student_and_projectors_and_no_teacher(row: Row) -> None:
    objective = build(row)
    student, teacher = collate(samples_for(row))
    for tokens in student.values():
        tokens.tokens_BND.requires_grad_()
    for features in teacher.values():
        features.tokens_BTPD.requires_grad_()
    objective(student, teacher).loss_B.mean().backward()
    for block in objective.config.blocks:
        grad = student[block].tokens_BND.grad
        assert grad is not None and torch.isfinite(grad).all() and (grad != 0).any()
        if objective.tokens == "reference":
            assert (grad[student[block].subject_ids_BN == -1] == 0).all()
    parameters = list(objective.parameters())
    assert parameters
    for parameter in parameters:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).any()
    assert all(features.tokens_BTPD.grad is None for features in teacher.values())


@every_objective
def test_order_of_the_batch_does_not_matter(row: Row) -> None:
    objective, samples = build(row), samples_for(row)
    terms = run(objective, samples)
    reordered = run(objective, [samples[i] for i in (2, 0, 3, 1)])
    torch.testing.assert_close(reordered.loss_B.mean(), terms.loss_B.mean())
    torch.testing.assert_close(reordered.loss_B, terms.loss_B[[2, 0, 3, 1]])


@every_objective
def test_each_sample_has_the_value_it_has_alone(row: Row) -> None:
    objective, samples = build(row), samples_for(row)
    together = run(objective, samples)
    for index, sample in enumerate(samples):
        alone = run(objective, [sample])
        torch.testing.assert_close(alone.loss_B[0], together.loss_B[index])
        for name, part in together.parts.items():
            torch.testing.assert_close(alone.parts[name][0], part[index])
        if together.similarity_B is not None and alone.similarity_B is not None:
            torch.testing.assert_close(alone.similarity_B[0], together.similarity_B[index])


@every_objective
def test_bf16_formula_is_no_worse_than_naive_bf16(row: Row) -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(3, 63, 100, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(3, 63, 100, dtype=torch.float64, generator=generator)
    ids = torch.arange(63).div(21, rounding_mode="floor").expand(3, 63)
    half = student.detach().bfloat16().requires_grad_()

    def value_and_gradient(
        formula: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor
    ) -> tuple[Tensor, Tensor]:
        value = formula(x, teacher.to(x.dtype), ids)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach().double(), gradient.double()

    truth = value_and_gradient(row.naive, student)
    exact = value_and_gradient(row.formula, student)
    ours, naive = (value_and_gradient(f, half) for f in (row.formula, row.naive))
    for want, same, have, rough in zip(truth, exact, ours, naive, strict=True):
        torch.testing.assert_close(same, want)
        assert (have - want).abs().max() <= (rough - want).abs().max() + 1e-4


@every_objective
def test_bf16_tokens_pass_through_float32_projectors(row: Row) -> None:
    objective = build(row)
    student, teacher = collate(samples_for(row))
    exact = objective(student, teacher)
    rounded = objective(
        {b: Tokens(x.tokens_BND.bfloat16(), x.grid, x.subject_ids_BN) for b, x in student.items()},
        {a: Features(x.tokens_BTPD.bfloat16(), x.grid) for a, x in teacher.items()},
    )
    assert rounded.loss_B.dtype == torch.float32
    torch.testing.assert_close(rounded.loss_B, exact.loss_B, atol=1e-2, rtol=0)


@every_objective
def test_every_setting_changes_the_loss(row: Row) -> None:
    fields = set(OBJECTIVES[row.name].Config.model_fields)
    assert set(row.changes) == fields - READ_BY_HARNESS
    samples = samples_for(row)
    base = run(build(row), samples).loss_B
    for setting, value in row.changes.items():
        changed = run(build(row, **{setting: value}), samples).loss_B
        assert not torch.allclose(changed, base), setting


@every_objective
def test_config_survives_json_and_refuses_what_it_does_not_know(row: Row) -> None:
    config_class = OBJECTIVES[row.name].Config
    shared = {"weight": 0.3, "gate": "t^3", "schedule": {"kind": "stop_at", "step": 9}}
    config = config_class.model_validate({**row.settings, **row.changes, **shared})
    assert config_class.model_validate_json(config.model_dump_json()) == config
    assert config_class.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="Extra inputs"):
        config_class.model_validate({**row.settings, "no_such_setting": 1})
    with pytest.raises(ValueError, match="frozen"):
        config.weight = 2.0


@every_objective
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("blocks", (), "blocks is empty"),
        ("blocks", (1, 1), "names a block twice"),
        ("blocks", (0, -1), "counted from 0, got -1"),
        ("weight", -0.5, "greater than or equal to 0"),
        ("weight", float("inf"), "finite"),
        ("teacher", "", "teacher is empty"),
    ],
)
def test_config_refuses_values_without_meaning(
    row: Row, setting: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[row.name].Config(**{**row.settings, setting: value})


@every_objective
def test_projectors_depend_on_the_seed_and_leave_global_randomness_alone(row: Row) -> None:
    before = torch.get_rng_state()
    first = build(row, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = build(row, seed=3).state_dict(), build(row, seed=4).state_dict()
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every_objective
def test_teachers_are_listed_and_a_missing_one_is_named(row: Row) -> None:
    config = OBJECTIVES[row.name].Config(**row.settings)
    assert set(config.teachers) <= set(TEACHER_DIMS)
    with pytest.raises(ValueError, match="needs teacher 'dino', but there is only: sam"):
        build_objective(config, student_dim=STUDENT_DIM, teacher_dims={"sam": 4})


@every_objective
def test_copies_and_saved_weights_give_the_same_loss(row: Row) -> None:
    objective, fresh = build(row), build(row, seed=9)
    fresh.load_state_dict(copy.deepcopy(objective.state_dict()))
    samples = samples_for(row)
    assert torch.equal(run(fresh, samples).loss_B, run(objective, samples).loss_B)


def test_unknown_objective_names_the_known_ones() -> None:
    config = ObjectiveConfig(name="rapa", blocks=(0,), teacher="dino")
    with pytest.raises(ValueError, match="unknown objective 'rapa': choose refalign, repa"):
        build_objective(config, student_dim=4, teacher_dims={"dino": 4})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tokens(torch.zeros(2, 7, 3), (2, 2, 2)),
        lambda: Tokens(torch.zeros(2, 8, 3), (2, 2, 2), torch.zeros(8, dtype=torch.int64)),
        lambda: Features(torch.zeros(2, 2, 5, 3), (2, 2, 2)),
        lambda: Features(torch.zeros(2, 8, 3), (2, 2, 2)),
    ],
)
def test_tokens_that_do_not_fill_their_grid_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"do not (fill|match)"):
        make()
