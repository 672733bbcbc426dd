"""The student's own average as a teacher: what it is, what it sees, when it runs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from alignlab import attach
from alignlab.errors import UserError
from alignlab.losses.objective import self_key
from alignlab.train import RunTrainer
from alignlab.training.batches import training_batch
from alignlab.training.flow_matching import interpolate
from alignlab.training.setup import Run, build_run
from tiny_runs import MakeConfig

pytestmark = pytest.mark.usefixtures("shared_clips")

SRA = "{name: sra, blocks: [0], deep_blocks: [2], projector_dim: 16, ema: 0.5}"
ALONE = ("objectives={}", "teachers={}", f"objectives.s={SRA}")


@pytest.fixture
def run(make_config: MakeConfig) -> Run:
    return build_run(make_config(*ALONE))


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in run.wan.transformer.named_parameters()}


def forward_passes(run: Run) -> Iterator[list[Any]]:
    seen: list[Any] = []
    with pytest.MonkeyPatch.context():
        handle = run.wan.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
        )
        yield seen
        handle.remove()


def test_the_average_starts_with_the_student_and_follows_it(run: Run) -> None:
    assert run.self_teacher is not None
    expected = trained(run)
    trainer = RunTrainer(run)
    with run.branch:
        for step in range(3):
            trainer.step(trainer.micro_batches())
            decay = min(0.5, (1 + step) / (10 + step))
            for name, value in trained(run).items():
                expected[name] = torch.lerp(expected[name], value, 1 - decay)
    found = run.self_teacher.average
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], value, atol=1e-6) for n, value in expected.items())
    assert run.state.ema is None and run.state.self_teacher is found


def test_it_sees_the_same_noise_and_captions_at_a_cleaner_level(run: Run) -> None:
    """Its features are those of a transformer with the average's weights on that input."""
    assert run.self_teacher is not None
    trainer = RunTrainer(run)
    with run.branch:
        trainer.step(trainer.micro_batches())
        (batch,) = trainer.micro_batches()
        assert batch.cleaner_B is not None
        assert ((batch.cleaner_B >= 0) & (batch.cleaner_B <= 0.2)).all()
        before = trained(run)
        found = run.self_teacher.features(run.branch, batch)[self_key(2)]
        assert all(torch.equal(before[n], value) for n, value in trained(run).items())
    run.wan.transformer.load_state_dict(run.self_teacher.average, strict=False)
    sigma_B = (batch.sigma_B - batch.cleaner_B).clamp_min(0)
    plain = build_run(run.config.model_copy(update={"objectives": {}}))
    plain.wan.transformer.load_state_dict(run.wan.transformer.state_dict())
    with plain.branch.of(plain.wan.transformer, run.config.model, blocks=[2]) as branch:
        with torch.no_grad():
            noisy = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, sigma_B)
            out = branch(noisy, sigma_B * 1000, batch.text_BLD, batch.references)
    expected = out.taps[2].video
    assert found.grid == expected.grid and not found.tokens_BTPD.requires_grad
    torch.testing.assert_close(found.tokens_BTPD.flatten(1, 2), expected.tokens_BND)


def test_the_level_is_drawn_for_the_sample_and_changes_no_other_draw(run: Run) -> None:
    def batch(samples: range, cleaner: float | None) -> Any:
        return training_batch(
            run.clips, run.config.flow, seed=0, step=3, samples=samples, cleaner=cleaner
        )

    whole, alone, none = batch(range(2), 0.2), batch(range(1, 2), 0.2), batch(range(2), None)
    assert torch.equal(whole.cleaner_B[1:], alone.cleaner_B) and none.cleaner_B is None
    assert torch.equal(whole.sigma_B, none.sigma_B)
    assert torch.equal(whole.noise_BCTHW, none.noise_BCTHW)
    assert not torch.equal(whole.cleaner_B, batch(range(2), 0.1).cleaner_B)


@pytest.mark.parametrize(("schedule", "passes"), [("constant", 2), ("{kind: stop_at, step: 1}", 1)])
def test_the_average_runs_once_a_step_while_it_is_read(
    schedule: str, passes: int, make_config: MakeConfig
) -> None:
    references = "data.references=[2,2]"  # one pass for all samples
    dropout = ("flow.reference_dropout=0", "flow.both_dropout=0")
    run = build_run(make_config(*ALONE, f"objectives.s.schedule={schedule}", references, *dropout))
    run.state.step = 1
    for seen in forward_passes(run):
        trainer = RunTrainer(run)
        with run.branch:
            trainer.step(trainer.micro_batches())
        assert len(seen) == passes
        if passes == 2:
            student, average = seen
            assert (average <= student).all() and not torch.equal(average, student)


def test_of_a_lora_the_average_holds_the_adapter(make_config: MakeConfig) -> None:
    lora = ["model.train=lora", "model.lora.rank=4", "model.lora.alpha=8"]
    run = build_run(make_config(*ALONE, *lora))
    assert run.self_teacher is not None
    names = run.self_teacher.average
    assert names and all("lora" in name for name in names)
    trainer = RunTrainer(run)
    with run.branch:
        _, terms = trainer.losses(next(iter(trainer.micro_batches())))
    assert "sim/s" in terms


def test_a_second_average_and_a_missing_deep_block_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"^objectives: s, t each have a moving average of the"):
        make_config(*ALONE, f"objectives.t={SRA}")
    with pytest.raises(UserError, match=r"^objectives\.s\.deep_blocks: block 70 does not exist"):
        build_run(make_config(*ALONE, "objectives.s.deep_blocks=[70]"))


def test_a_loop_of_ones_own_has_no_average(transformer: nn.Module) -> None:
    sra = {"name": "sra", "blocks": [0], "deep_blocks": [1], "projector_dim": 8}
    with pytest.raises(UserError, match=r"^objectives\.x: sra reads a moving average of the tran"):
        attach(transformer, objectives={"x": sra})
