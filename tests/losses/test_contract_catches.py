"""Every check of the contract fails for an objective that breaks what it checks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import pytest
import torch
from pydantic import ConfigDict, field_validator
from torch import nn

from alignlab.kernels.dispatch import Impl
from alignlab.losses.objective import Context, Features, ObjectiveConfig, Terms, Tokens
from alignlab.losses.repa import Repa, RepaConfig, repa_loss
from alignlab.losses.testing import contract
from alignlab.losses.testing.contract import CHECKS, Check, ContractCase

Student: TypeAlias = dict[int, Tokens]
Teacher: TypeAlias = dict[str, Features]
Change = Callable[[Repa, Terms, Student, Teacher], Terms]
FORWARD, INIT = Repa.forward, Repa.__init__

CASE = ContractCase(
    objective=Repa,
    settings={"teacher": "dino", "blocks": (0, 1), "projector_dim": 8},
    changes={
        "blocks": (1,),
        "teacher": "clip",
        "projector_dim": 9,
        "centered": True,
        "temporal_difference": True,
    },
    formula=lambda s, t, ids: repa_loss(s, t),
    naive=lambda s, t, ids: -nn.functional.cosine_similarity(s, t, dim=-1).mean(-1),
)


class Loose(RepaConfig):
    """Takes any key."""

    model_config = ConfigDict(extra="ignore")


class WithImpl(RepaConfig):
    """Has an `impl` that Repa does not read."""

    impl: Impl = "auto"


class Careless(RepaConfig):
    """Takes any blocks."""

    @field_validator("blocks")
    @classmethod
    def _blocks_are_indices(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        return blocks


@dataclass(frozen=True)
class Break:
    """One way to break Repa, and the check that has to see it."""

    check: Check
    change: Change = lambda objective, terms, student, teacher: terms
    after_init: Callable[[Repa, int], object] = lambda objective, seed: None
    config: type[ObjectiveConfig] = RepaConfig
    case: ContractCase = CASE

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forward(
            objective: Repa, student: Student, teacher: Teacher, context: Context | None = None
        ) -> Terms:
            terms = FORWARD(objective, student, teacher)
            return self.change(objective, terms, student, teacher)

        def init(objective: Repa, config: RepaConfig, **arguments: Any) -> None:
            INIT(objective, config, **arguments)
            self.after_init(objective, arguments["seed"])

        monkeypatch.setattr(Repa, "forward", forward)
        monkeypatch.setattr(Repa, "__init__", init)
        monkeypatch.setattr(Repa, "Config", self.config)


def plus(value: Callable[[Terms, Teacher], Any]) -> Change:
    return lambda o, terms, s, teacher: replace(terms, loss_B=terms.loss_B + value(terms, teacher))


def learn_aside(objective: Repa, seed: int) -> None:
    object.__setattr__(objective, "learnt", float(seed))


def same_start(objective: Repa, seed: int) -> None:
    for parameter in objective.parameters():
        nn.init.constant_(parameter, 0.1)


BREAKS = {
    "no row": Break(
        contract.check_is_registered_final_and_named,
        case=replace(CASE, objective=type("Other", (Repa,), {"__doc__": "Not registered."})),
    ),
    "infinite loss": Break(
        contract.check_gives_one_finite_value_per_sample,
        plus(lambda terms, teacher: torch.inf),
    ),
    "part with a gradient": Break(
        contract.check_gives_one_finite_value_per_sample,
        lambda o, terms, s, t: replace(terms, parts={"align": terms.loss_B}),
    ),
    "aligned of another kind": Break(
        contract.check_gives_one_finite_value_per_sample,
        lambda o, terms, s, t: replace(terms, aligned_B=torch.ones(4)),
    ),
    "gradient to the teacher of the formula": Break(
        contract.check_gradient_reaches_student_and_projectors_and_no_teacher,
        case=replace(CASE, formula=CASE.naive),
    ),
    "gradient to a teacher": Break(
        contract.check_gradient_reaches_student_and_projectors_and_no_teacher,
        plus(lambda terms, teacher: teacher["dino"].tokens_BTPD.mean((1, 2, 3))),
    ),
    "unused weight": Break(
        contract.check_gradient_reaches_student_and_projectors_and_no_teacher,
        after_init=lambda o, seed: o.register_parameter("idle", nn.Parameter(torch.ones(1))),
    ),
    "place in the batch counts": Break(
        contract.check_order_of_the_batch_does_not_matter,
        plus(lambda terms, teacher: 0.1 * torch.arange(len(terms.loss_B))),
    ),
    "leak between samples": Break(
        contract.check_each_sample_has_the_value_it_has_alone,
        plus(lambda terms, teacher: 0.1 * terms.loss_B.mean()),
    ),
    "another formula": Break(
        contract.check_bf16_formula_is_no_worse_than_naive_bf16,
        case=replace(CASE, formula=lambda s, t, ids: 1 + repa_loss(s, t)),
    ),
    "imprecise formula": Break(
        contract.check_bf16_formula_is_no_worse_than_naive_bf16,
        case=replace(
            CASE,
            formula=lambda s, t, ids: (
                repa_loss(s, t) if s.dtype == torch.float64 else repa_loss(s * (s.abs() > 0.1), t)
            ),
        ),
    ),
    "bfloat16 loss": Break(
        contract.check_bf16_tokens_pass_through_float32_projectors,
        lambda o, terms, student, t: replace(
            terms, loss_B=terms.loss_B.to(student[0].tokens_BND.dtype)
        ),
    ),
    "setting without a change": Break(
        contract.check_every_setting_changes_the_loss,
        case=replace(CASE, changes={k: v for k, v in CASE.changes.items() if k != "teacher"}),
    ),
    "change without effect": Break(
        contract.check_every_setting_changes_the_loss,
        case=replace(CASE, changes={**CASE.changes, "projector_dim": 8}),
    ),
    "weight applied twice": Break(
        contract.check_every_setting_changes_the_loss,
        lambda o, terms, s, t: replace(terms, loss_B=cast(float, o.config.weight) * terms.loss_B),
    ),
    "an unread impl": Break(
        contract.check_every_implementation_gives_the_same_loss, config=WithImpl
    ),
    "unknown keys are taken": Break(
        contract.check_config_survives_json_and_refuses_what_it_does_not_know, config=Loose
    ),
    "blocks named twice": Break(
        contract.check_config_refuses_values_without_meaning, config=Careless
    ),
    "global randomness": Break(
        contract.check_projectors_depend_on_the_seed_and_leave_global_randomness_alone,
        after_init=lambda o, seed: torch.rand(1),
    ),
    "seed without effect": Break(
        contract.check_projectors_depend_on_the_seed_and_leave_global_randomness_alone,
        after_init=same_start,
    ),
    "teachers not listed": Break(
        contract.check_teachers_are_listed_and_a_missing_one_is_named,
        case=replace(CASE, settings={**CASE.settings, "teacher": "sam"}),
    ),
    "something learnt is not saved": Break(
        contract.check_copies_and_saved_weights_give_the_same_loss,
        lambda o, terms, s, t: replace(terms, loss_B=terms.loss_B + getattr(o, "learnt")),  # noqa: B009
        learn_aside,
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_sound_objective_passes(check: Check) -> None:
    check(CASE)


def test_every_check_has_something_to_catch() -> None:
    assert {broken.check for broken in BREAKS.values()} == set(CHECKS)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_one_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[name].apply(monkeypatch)
    with pytest.raises(AssertionError):
        BREAKS[name].check(BREAKS[name].case)


def test_one_that_says_that_it_couples_samples_may(monkeypatch: pytest.MonkeyPatch) -> None:
    leak = BREAKS["leak between samples"]
    leak.apply(monkeypatch)
    monkeypatch.setattr(Repa, "couples_samples", True)
    leak.check(leak.case)
