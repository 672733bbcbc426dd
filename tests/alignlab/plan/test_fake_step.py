"""A step on fake tensors against the same step of the real run: operations and live memory."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from alignlab.config.run import RunConfig
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_models import CPU, FakeParts, fake_wan
from alignlab.plan.fake_step import FakeStep, fake_step, follow_step, hold_run
from alignlab.plan.fake_values import fake_values
from alignlab.plan.live_memory import LiveMemory, Peak
from alignlab.plan.parts import Parts
from alignlab.train import RunTrainer
from alignlab.training.setup import build_run
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


def attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))


def attention_backward(
    grad: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *_: object,
    **__: object,
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


ON_CPU = {  # which torch has formulas for on CUDA alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def measured(config: RunConfig) -> tuple[Peak, int, dict[str, int]]:
    """Of the second step of the real run: the peak, torch's count of operations, what stays."""
    run, parts = build_run(config), Parts()
    trainer, live = RunTrainer(run), LiveMemory(parts.now)
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    hold_run(live, run)
    with run.branch:
        with live:
            follow_step(live, run, parts)
        trainer.step(list(trainer.micro_batches()))  # which encodes the clips
        run.state.step = 0
        live.hold(
            "optimizer state", (v for s in run.state.optimizer.state.values() for v in s.values())
        )
        live.start()
        with live:
            trainer.step(trainer.micro_batches())
        run.state.step = 0
        with counter:
            trainer.step(trainer.micro_batches())
    return live.peak(), counter.get_total_flops(), live.standing()


@pytest.mark.parametrize("name", RUNS)
def test_a_step_costs_what_the_real_one_does(name: str, make_config: MakeConfig) -> None:
    config = make_config(*ALIKE, *RUNS[name])
    plan, (peak, flops, standing) = planned(config), measured(config)
    assert sum(plan.flops.values()) * config.optim.accumulate == flops > 0
    assert plan.unknown == frozenset()
    print(name, plan.peak, peak, plan.standing, standing)
    assert plan.peak.total == pytest.approx(peak.total, rel=0.1)
    for part in ("weights", "optimizer state", "moving averages", "teachers"):
        assert plan.standing.get(part, 0) == standing.get(part, 0)
