"""What a plan says of a Stage 1 step, against a real one on the same settings."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alignlab.distributed.ranks import single_rank
from alignlab.errors import UserError
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_stage1 import FakeStage1, fake_stage1
from alignlab.plan.fake_step import OPTIMIZER, WEIGHTS, follow_step, tensors_of
from alignlab.plan.fake_values import tensors_in
from alignlab.plan.live_memory import LiveMemory, Peak
from alignlab.plan.run_plan import TEXT, RunPlan
from alignlab.plan.stage1_plan import plan_stage1
from alignlab.recipe import load_stage1_run
from alignlab.runs.checkpoint_folders import step_folders
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.train import Stage1Trainer, stage1_trainer, train_stage1
from measured_steps import ON_CPU

SMALL = (
    *("data.frames=5", "data.references=[2,2]", "data.train_clips=4", "data.val_clips=2"),
    *("stage1.val_clips=2", "optim.batch_size=2", "optim.warmup=0", "steps=1"),
    "tracking.mlflow=none",
)
KINDS = ("sara", "moalign")


def config_of(kind: str, *overrides: str) -> Stage1Config:
    return load_stage1_run(kind, f"stage1_{kind}", [*SMALL, *overrides])


def fake_of(config: Stage1Config) -> FakeStage1:
    with ExitStack() as stack:
        return fake_stage1(config, Architectures(stack), is_cuda=False)


def plan_of(config: Stage1Config, gpus: int = 1) -> RunPlan:
    with ExitStack() as stack:
        return plan_stage1(config, Architectures(stack), gpus=gpus)


def states(trainer: Stage1Trainer) -> Iterator[Tensor]:
    for state in trainer.state.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def measured(config: Stage1Config) -> tuple[Peak, dict[str, int], int]:
    """Peak, bytes that stay, and torch's count of FLOPs of a second real step."""
    trainer, live = stage1_trainer(config, single_rank("fp32")), LiveMemory()
    trainer.encode_texts(0)
    trainer.step(trainer.micro_batches())  # which encodes the clips
    (batch,) = trainer.micro_batches()
    live.pass_over(tensor for clip in batch for tensor in tensors_in(vars(clip).values()))
    live.hold(WEIGHTS, tensors_of(trainer.task.network))
    live.hold(OPTIMIZER, states(trainer))
    follow_step(live, trainer.state)
    live.start()
    with live:
        trainer.step([batch])
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    with counter:
        trainer.step([batch])
    return live.peak(), live.standing(), int(counter.get_total_flops())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage1_step_costs_what_the_real_one_does(kind: str, tmp_path: Path) -> None:
    config = config_of(kind, f"output={tmp_path}")
    fake, (peak, standing, flops) = fake_of(config), measured(config)
    assert sum(fake.step.flops.values()) == flops > 0
    assert fake.step.unknown == frozenset()
    assert fake.step.peak.total == pytest.approx(peak.total, rel=0.1)
    for part in (WEIGHTS, OPTIMIZER):
        assert fake.step.standing[part] == standing[part]
    assert fake.texts == (4 if kind == "sara" else 0)  # two entities, both, the background


def test_what_a_stage1_training_keeps_has_the_planned_size(tmp_path: Path) -> None:
    config = config_of("moalign", f"output={tmp_path}")
    plan = plan_of(config)
    run = train_stage1(config).parent
    (newest,) = step_folders(run / "checkpoints")
    sizes = {path.name: path.stat().st_size for path in newest.glob("*.safetensors")}
    assert plan.checkpoint.one == pytest.approx(sum(sizes.values()), rel=0.05)
    assert plan.checkpoint.optimizer == pytest.approx(sizes["optimizer.safetensors"], rel=0.05)


def test_what_the_cache_keeps_of_stage1_is_computed_once() -> None:
    kept, live = (
        plan_of(config_of("sara", f"data.cache.mode={mode}")) for mode in ("write", "off")
    )
    assert kept.clip_flops.keys() == {"teachers", TEXT}
    assert live.clip_flops == {} and not any(live.clip.cached.values())
    assert live.step_flops[TEXT] == 2 * kept.clip_flops[TEXT]
    assert live.step_flops["teachers"] == 2 * kept.clip_flops["teachers"]
    assert live.step_flops["Stage 1 network"] == kept.step_flops["Stage 1 network"]
    step = next(phase for phase in live.phases if phase.name == "step")
    assert {"teachers", "text encoder"} <= step.parts.keys()
    step = next(phase for phase in kept.phases if phase.name == "step")
    assert not {"teachers", "text encoder"} & step.parts.keys()


def test_a_stage1_training_has_one_gpu() -> None:
    with pytest.raises(UserError, match=r"^a Stage 1 training has one process: 2 GPUs do not"):
        plan_of(config_of("moalign"), gpus=2)
