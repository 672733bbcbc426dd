"""What every objective owes the harness, as checks that any test suite can run.

For an objective of your own, also outside this repository:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check: Check, tmp_path: Path) -> None:
        check(CASE.ready(tmp_path))

A check that fails raises AssertionError.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.losses import registry
from alignlab.losses.objective import (
    Features,
    Objective,
    ObjectiveConfig,
    SelfTeacherConfig,
    Terms,
    Tokens,
)
from alignlab.losses.testing.samples import (
    LATENTS_DIM,
    STUDENT_DIM,
    TEACHER_DIMS,
    OneSample,
    collate,
    draw_samples,
)

READ_BY_HARNESS = frozenset({"name", "weight", "schedule", "warmup", "gate"})
IMPL = "impl"
"""The setting that chooses how a similarity is computed, and so must change no value."""

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(student_BND, teacher_BND, subject_ids_BN) -> (B,), of 63 tokens: 3 frames or subjects of 21."""


@dataclass(frozen=True)
class ContractCase:
    """One objective with what it takes to check it.

    Args:
        objective: the class, registered under its config's name.
        settings: small settings; the teachers are "dino" and "clip", where it reads one, the blocks
            0, 1 and 2.
        changes: another value for every setting that the harness does not read itself, without
            `impl`.
        formula: the objective's pure function, with a projected student; in place of the teacher
            there is what else the objective compares it with, if anything.
        naive: the same written down plainly, without care for precision.
        alongside: by setting of `changes`, others that must change with it.
        prepare: completes the case with what needs files, which it may write into the folder.
    """

    objective: type[Objective]
    settings: Mapping[str, Any]
    changes: Mapping[str, Any]
    formula: Formula
    naive: Formula
    alongside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prepare: Callable[[Self, Path], Self] | None = None

    @property
    def name(self) -> str:
        """What recipes call the objective."""
        return str(self.objective.Config.model_fields["name"].default)

    def ready(self, folder: Path) -> Self:
        """Gives the case with its files written below `folder`, which is what checks take."""
        return self if self.prepare is None else replace(self.prepare(self, folder), prepare=None)

    def build(self, seed: int = 0, **changed: Any) -> Objective:
        """Builds the objective with the case's settings and `changed` over them."""
        assert self.prepare is None, "call ready(folder) first"
        config = self.objective.Config(**{**self.settings, **changed})
        return registry.build_objective(
            config,
            student_dim=STUDENT_DIM,
            teacher_dims=TEACHER_DIMS,
            latents_dim=LATENTS_DIM,
            seed=seed,
        )

    def samples(self) -> list[OneSample]:
        """Draws four samples of the kind that the objective taps."""
        return draw_samples(self.objective.tokens)


Check = Callable[[ContractCase], None]


def check_is_registered_final_and_named(case: ContractCase) -> None:
    """`OBJECTIVES` has the class; it is final and its config carries its name."""
    assert registry.OBJECTIVES.get(case.name) is case.objective, f"no row for {case.name!r}"
    assert getattr(case.objective, "__final__", False), "not final"
    assert issubclass(case.objective.Config, ObjectiveConfig)
    assert re.fullmatch(r"|\d{4}\.\d{4,5}", case.objective.paper), (
        "paper is no arXiv id, and not empty"
    )
    assert (case.objective.__doc__ or "").strip(), "no docstring: its first line is what users read"


def check_gives_one_finite_value_per_sample(case: ContractCase) -> None:
    """Loss, parts and similarity are (B,) and finite; only the loss carries a gradient."""
    student, teacher, context = collate(case.samples())
    for tokens in student.values():  # an objective may have no projector
        tokens.tokens_BND.requires_grad_()
    terms: Terms = case.build()(student, teacher, context)
    assert isinstance(terms, Terms)
    assert terms.loss_B.shape == (4,) and torch.isfinite(terms.loss_B).all()
    assert terms.loss_B.requires_grad and terms.parts, "no gradient, or no named part for the log"
    for name, part in terms.parts.items():
        assert part.shape == (4,) and torch.isfinite(part).all(), name
        assert not part.requires_grad, f"part {name} is not detached"
    if terms.similarity_B is not None:
        assert terms.similarity_B.shape == (4,) and not terms.similarity_B.requires_grad
        assert (terms.similarity_B.abs() <= 1 + 1e-6).all(), "similarity is no cosine"
    if terms.similarity_LB is not None:
        blocks = len(case.build().config.blocks)
        assert terms.similarity_LB.shape == (blocks, 4) and not terms.similarity_LB.requires_grad
        assert terms.similarity_B is not None, "similarities of blocks, and no mean of them"
        torch.testing.assert_close(terms.similarity_LB.mean(0), terms.similarity_B)
    for value in (terms.centered_B, terms.watched_B):
        assert value is None or (value.shape == (4,) and not value.requires_grad)
    if terms.centered_B is not None:
        assert terms.similarity_B is not None, "a centred similarity beside none"
        assert (terms.centered_B.abs() <= 1 + 1e-6).all(), "centred similarity is no cosine"
    if terms.aligned_B is not None:
        assert terms.aligned_B.shape == (4,) and terms.aligned_B.dtype == torch.bool
        # the third sample of the contract has no reference
        assert case.objective.tokens == "video" or not terms.aligned_B[2], "nothing is aligned"


def check_gradient_reaches_student_and_projectors_and_no_teacher(case: ContractCase) -> None:
    """Every tapped block and every trainable weight is moved, no teacher, no padding."""
    objective = case.build()
    student, teacher, context = collate(case.samples())
    for tokens in student.values():
        tokens.tokens_BND.requires_grad_()
    for features in teacher.values():
        features.tokens_BTPD.requires_grad_()
    torch.autograd.backward(objective(student, teacher, context).loss_B.mean())
    for block in objective.config.blocks:
        grad = _useful_gradient(student[block].tokens_BND, f"student tokens of block {block}")
        if objective.tokens == "reference":
            ids_BN = student[block].subject_ids_BN
            assert ids_BN is not None and (grad[ids_BN == -1] == 0).all(), "padding has a gradient"
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            _useful_gradient(parameter, name)
        else:
            assert parameter.grad is None
    for alias, features in teacher.items():
        assert features.tokens_BTPD.grad is None, f"a gradient reaches teacher {alias}"
    drawn_BND = torch.randn(2, 2, 63, 100, generator=torch.Generator().manual_seed(1))
    student_BND, teacher_BND = (x.requires_grad_() for x in drawn_BND.unbind())
    ids_BN = torch.arange(63).div(21, rounding_mode="floor").expand(2, 63)
    torch.autograd.backward(case.formula(student_BND, teacher_BND, ids_BN).mean())
    assert teacher_BND.grad is None, "a gradient reaches the teacher of the formula"


def check_order_of_the_batch_does_not_matter(case: ContractCase) -> None:
    """Permuting the samples permutes their values and leaves their mean."""
    objective, samples = case.build(), case.samples()
    terms = _run(objective, samples)
    reordered = _run(objective, [samples[i] for i in (2, 0, 3, 1)])
    assert_close(reordered.loss_B.mean(), terms.loss_B.mean())
    assert_close(reordered.loss_B, terms.loss_B[[2, 0, 3, 1]])


def check_each_sample_has_the_value_it_has_alone(case: ContractCase) -> None:
    """Nothing leaks between samples, whatever their numbers of references; but for an objective
    that says that it couples them."""
    objective, samples = case.build(), case.samples()
    if objective.couples_samples:
        return
    together = _run(objective, samples)
    for index, sample in enumerate(samples):
        alone = _run(objective, [sample])
        assert_close(alone.loss_B[0], together.loss_B[index])
        for name, part in together.parts.items():
            assert_close(alone.parts[name][0], part[index])
        assert _names(alone) == _names(together), "names depend on the samples"
        if together.similarity_B is not None and alone.similarity_B is not None:
            assert_close(alone.similarity_B[0], together.similarity_B[index])
        if together.centered_B is not None and alone.centered_B is not None:
            assert_close(alone.centered_B[0], together.centered_B[index])


def _names(terms: Terms) -> tuple[object, ...]:
    similarities = (terms.similarity_B, terms.similarity_LB, terms.centered_B)
    optional = (*similarities, terms.aligned_B, terms.watched_B)
    return (*terms.parts, *(value is None for value in optional))


def check_bf16_formula_is_no_worse_than_naive_bf16(case: ContractCase) -> None:
    """In float64 the two formulas agree; in bfloat16 ours is as near to the truth as the other."""
    rng = torch.Generator().manual_seed(1)
    student = torch.randn(3, 63, 100, dtype=torch.float64, generator=rng).requires_grad_()
    teacher = torch.randn(3, 63, 100, dtype=torch.float64, generator=rng)
    ids = torch.arange(63).div(21, rounding_mode="floor").expand(3, 63)
    half = student.detach().bfloat16().requires_grad_()

    def value_and_gradient(formula: Formula, x: Tensor) -> tuple[Tensor, Tensor]:
        value = formula(x, teacher.to(x.dtype), ids)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach().double(), gradient.double()

    truth = value_and_gradient(case.naive, student)
    exact = value_and_gradient(case.formula, student)
    ours, naive = (value_and_gradient(f, half) for f in (case.formula, case.naive))
    for want, same, have, rough in zip(truth, exact, ours, naive, strict=True):
        assert_close(same, want)
        error, allowed = (have - want).abs().max(), (rough - want).abs().max() + 1e-4
        assert error <= allowed, f"bf16 error {error:.2e}, allowed {allowed:.2e}"


def check_bf16_tokens_pass_through_float32_projectors(case: ContractCase) -> None:
    """bfloat16 tokens and features give a float32 loss within 0.01, or 1 %, of the exact one."""
    objective = case.build()
    student, teacher, context = collate(case.samples())
    exact = objective(student, teacher, context)
    rounded = objective(
        {b: Tokens(x.tokens_BND.bfloat16(), x.grid, x.subject_ids_BN) for b, x in student.items()},
        {a: Features(x.tokens_BTPD.bfloat16(), x.grid) for a, x in teacher.items()},
        context,
    )
    assert rounded.loss_B.dtype == torch.float32
    assert_close(rounded.loss_B, exact.loss_B, atol=1e-2, rtol=1e-2)


def check_every_setting_changes_the_loss(case: ContractCase) -> None:
    """No setting goes unread: each changes the loss or the student's gradient; weight, schedule,
    warm-up and gate are the harness's to apply, once."""
    settings = set(case.objective.Config.model_fields) - READ_BY_HARNESS - {IMPL}
    if issubclass(case.objective.Config, SelfTeacherConfig):
        settings -= {"cleaner", "ema", "mask_ratio"}  # of the passes through the transformer
    unlisted = settings ^ set(case.changes)
    assert not unlisted, f"changes must name exactly the settings, not so: {sorted(unlisted)}"
    samples = case.samples()
    base, gradients = _value_and_gradients(case.build(), samples)
    for setting, value in case.changes.items():
        changed = case.build(**{setting: value, **case.alongside.get(setting, {})})
        found, others = _value_and_gradients(changed, samples)
        different = not torch.allclose(found, base)
        # such as what says where the gradient goes
        different |= any(not torch.allclose(others[b], g) for b, g in gradients.items())
        assert different, f"{setting}={value!r} changes nothing"
    shared: dict[str, Any] = {"weight": 0.0, "gate": "t^3", "warmup": 9}
    shared["schedule"] = {"kind": "stop_at", "step": 0}
    assert_close(_run(case.build(**shared), samples).loss_B, base)


def check_every_implementation_gives_the_same_loss(case: ContractCase) -> None:
    """`impl`, where there is one, says how the loss is computed; one that cannot run is refused."""
    if IMPL not in case.objective.Config.model_fields:
        return
    samples = case.samples()
    eager, chunked = (_run(case.build(impl=i), samples).loss_B for i in ("eager", "chunked"))
    assert_close(chunked, eager)
    with _refused("triton"):  # no Triton kernel takes float64, and some operations have none
        _run(case.build(impl="triton").double(), samples)


def check_config_survives_json_and_refuses_what_it_does_not_know(case: ContractCase) -> None:
    """A run folder gives back the config that was written into it; configs are frozen."""
    config_class = case.objective.Config
    shared = {"weight": 0.3, "gate": "t^3", "schedule": {"kind": "stop_at", "step": 9}}
    every = [{}, *({s: v, **case.alongside.get(s, {})} for s, v in case.changes.items())]
    for changed in every:
        config = config_class.model_validate({**case.settings, **changed, **shared})
        assert config_class.model_validate_json(config.model_dump_json()) == config
        assert config_class.model_validate(config.model_dump(mode="json")) == config
    with _refused("Extra inputs"):
        config_class.model_validate({**case.settings, "no_such_setting": 1})
    with _refused("frozen"):
        config.weight = 2.0


def check_config_refuses_values_without_meaning(case: ContractCase) -> None:
    """Blocks, weight and teacher are held to what `ObjectiveConfig` promises."""
    reads_teacher = case.objective.reads == "teacher"
    for setting, value, message in (
        ("blocks", (), "blocks is empty"),
        ("blocks", (1, 1), "names a block twice"),
        ("blocks", (0, -1), "counted from 0, got -1"),
        ("weight", -0.5, "greater than or equal to 0"),
        ("weight", float("inf"), "finite"),
        ("teacher", "", "teacher is empty" if reads_teacher else "reads no teacher"),
    ):
        with _refused(message):
            case.objective.Config(**{**case.settings, setting: value})


def check_projectors_depend_on_the_seed_and_leave_global_randomness_alone(
    case: ContractCase,
) -> None:
    """The same seed gives the same bits, and building draws nothing from torch's own state."""
    before = torch.get_rng_state()
    first = case.build(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "global random state was used"
    torch.rand(5)
    again, other = case.build(seed=3), case.build(seed=4).state_dict()
    assert first.keys() == again.state_dict().keys() == other.keys()
    assert all(torch.equal(first[name], value) for name, value in again.state_dict().items())
    if any(p.requires_grad for p in again.parameters()):
        assert any(not torch.equal(first[name], other[name]) for name in first), "seed is unread"


def check_teachers_are_listed_and_a_missing_one_is_named(case: ContractCase) -> None:
    """`config.teachers` is what `forward` reads, and none where `reads` names something else."""
    config = case.objective.Config(**case.settings)
    if case.objective.reads != "teacher":
        assert config.teachers == (), "teachers, and reads names something else"
        assert case.objective.reads == "nothing" or case.objective.tokens == "video"
        return
    assert config.teachers, "reads a teacher, and names none"
    assert set(config.teachers) <= set(TEACHER_DIMS)
    with _refused(f"needs teacher '{config.teachers[0]}', but there is only: sam"):
        registry.build_objective(config, student_dim=STUDENT_DIM, teacher_dims={"sam": 4})


def check_copies_and_saved_weights_give_the_same_loss(case: ContractCase) -> None:
    """All that an objective has learnt is in its `state_dict`."""
    objective, fresh = case.build(), case.build(seed=9)
    fresh.load_state_dict(copy.deepcopy(objective.state_dict()))
    samples = case.samples()
    assert torch.equal(_run(fresh, samples).loss_B, _run(objective, samples).loss_B)


CHECKS: tuple[Check, ...] = (
    check_is_registered_final_and_named,
    check_gives_one_finite_value_per_sample,
    check_gradient_reaches_student_and_projectors_and_no_teacher,
    check_order_of_the_batch_does_not_matter,
    check_each_sample_has_the_value_it_has_alone,
    check_bf16_formula_is_no_worse_than_naive_bf16,
    check_bf16_tokens_pass_through_float32_projectors,
    check_every_setting_changes_the_loss,
    check_every_implementation_gives_the_same_loss,
    check_config_survives_json_and_refuses_what_it_does_not_know,
    check_config_refuses_values_without_meaning,
    check_projectors_depend_on_the_seed_and_leave_global_randomness_alone,
    check_teachers_are_listed_and_a_missing_one_is_named,
    check_copies_and_saved_weights_give_the_same_loss,
)


def _run(objective: Objective, samples: list[OneSample]) -> Terms:
    terms: Terms = objective(*collate(samples))
    return terms


def _value_and_gradients(
    objective: Objective, samples: list[OneSample]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss of each sample, and the gradient of their mean in the tokens of each block."""
    student, teacher, context = collate(samples)
    tokens = {block: x.tokens_BND.requires_grad_() for block, x in student.items()}
    loss_B: Tensor = objective(student, teacher, context).loss_B
    gradients = torch.autograd.grad(loss_B.mean(), list(tokens.values()), allow_unused=True)
    pairs = zip(tokens.items(), gradients, strict=True)
    return loss_B.detach(), {
        block: torch.zeros_like(x) if gradient is None else gradient
        for (block, x), gradient in pairs
    }


def _useful_gradient(tensor: Tensor, what: str) -> Tensor:
    grad = tensor.grad
    assert grad is not None, f"no gradient reaches {what}"
    assert torch.isfinite(grad).all() and (grad != 0).any(), (
        f"gradient of {what}: zero or not finite"
    )
    return grad


@contextmanager
def _refused(message: str) -> Iterator[None]:
    """Expects a ValueError (pydantic's are) whose text contains `message`."""
    try:
        yield
    except ValueError as error:
        assert message in str(error), f"expected {message!r} in: {error}"
    else:
        raise AssertionError(f"nothing was refused: expected an error with {message!r}")
