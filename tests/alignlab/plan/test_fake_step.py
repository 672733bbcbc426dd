"""A step on fake tensors against the same step of the real run: operations and live memory."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from alignlab.config.run import RunConfig
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_models import fake_wan
from alignlab.plan.fake_step import EMA, OPTIMIZER, TEACHERS, WEIGHTS, FakeStep, fake_step
from alignlab.plan.fake_values import fake_values
from alignlab.plan.flops import count_flops
from alignlab.plan.parts import RECOMPUTATION
from alignlab.teachers.original import ORIGINALS, WHEEL_SETTINGS
from alignlab.teachers.preprocessing import row_preprocessing
from alignlab.teachers.registry import teacher_rows
from alignlab.teachers.teacher import LaterModel, Teacher
from alignlab.teachers.wheels import WHEELS
from alignlab.train import RunTrainer
from alignlab.training.setup import build_run
from measured_steps import ON_CPU, measured_steps
from tiny_runs import MakeConfig

pytestmark = pytest.mark.usefixtures("shared_clips")

# All samples alike, as a plan takes them.
ALIKE = (
    "data.references=[2,2]",
    *("flow.text_dropout=0", "flow.reference_dropout=0", "flow.both_dropout=0"),
)
LORA = ("model.train=lora", "model.lora.rank=4", "model.precision=bf16")
RUNS = {
    "full fp32": ("data.frames=9", "optim.ema=0.9"),
    "lora bf16, checkpointing": (*LORA, "model.gradient_checkpointing=true", "data.frames=9"),
    "references and teacher, accumulate": (
        *("optim.accumulate=2", "optim.batch_size=4", "data.cache.mode=off"),
        "objectives.repa={name: repa, teacher: dino, blocks: [1], projector_dim: 32}",
    ),
}


def planned(config: RunConfig) -> FakeStep:
    with ExitStack() as stack:
        return fake_step(config, Architectures(stack), is_cuda=False)


def counted(trainer: RunTrainer) -> int:
    """torch's count of a step."""
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    with trainer.run.branch, counter:
        trainer.step(trainer.micro_batches())
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", RUNS)
def test_a_step_costs_what_the_real_one_does(name: str, make_config: MakeConfig) -> None:
    config = make_config(*ALIKE, *RUNS[name])
    plan, (peak, standing, trainer) = planned(config), measured_steps(config)
    assert sum(plan.flops.values()) * config.optim.accumulate == counted(trainer) > 0
    assert plan.unknown == frozenset()
    assert plan.peak.total == pytest.approx(peak.total, rel=0.1)
    for part in (WEIGHTS, OPTIMIZER, EMA, TEACHERS):
        assert plan.standing.get(part, 0) == standing.get(part, 0)
    assert plan.trained == sum(p.numel() for p in trainer.state.names)


def test_frozen_weights_have_the_dtypes_that_loading_gives_them(make_config: MakeConfig) -> None:
    config = make_config(*LORA)
    with fake_values():
        fake = fake_wan(config, Path(config.model.path)).transformer
        dtypes = {name: p.dtype for name, p in fake.named_parameters()}
    real = build_run(config).wan.transformer
    assert dtypes == {name: p.dtype for name, p in real.named_parameters()}


def test_forward_backward_and_recomputation_are_told_apart(make_config: MakeConfig) -> None:
    """Gradients of activations and of weights cost a forward pass each, checkpointing one more."""
    plain, again = (
        planned(make_config(*ALIKE, f"model.gradient_checkpointing={on}")).flops
        for on in (False, True)
    )
    assert plain == {part: count for part, count in again.items() if part != RECOMPUTATION}
    assert 0.9 * plain["transformer"] < again[RECOMPUTATION] <= plain["transformer"]
    assert 1.8 < plain["transformer, backward"] / plain["transformer"] < 2.3
    assert 1.8 < plain["projectors, backward"] / plain["projectors"] <= 2.0


@pytest.mark.parametrize("family", WHEELS)
def test_teachers_in_wheels_are_planned_without_the_wheel(
    family: str, make_config: MakeConfig
) -> None:
    config = make_config(
        f"teachers.cnn={{family: {family}}}",
        "objectives.repa={name: repa, teacher: cnn, blocks: [1], projector_dim: 32}",
        "data.frames=9",
    )
    cost = next(teacher for teacher in planned(config).teachers if teacher.alias == "cnn")
    model = ORIGINALS[family].build(WHEEL_SETTINGS[family]()).to_empty(device="cpu").eval()
    row = teacher_rows()[family]
    real = Teacher(LaterModel.of(model), family, row.feature, preprocessing=row_preprocessing(row))
    height, width = config.data.size
    frames_BTHWC = torch.zeros(1, 9, height, width, 3, dtype=torch.uint8)
    flops = count_flops(lambda: real.encode(frames_BTHWC, (height // 16, width // 16))).total
    assert cost.flops == flops > 0
    assert cost.weights == sum(t.numel() * t.element_size() for t in model.state_dict().values())
