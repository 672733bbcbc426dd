"""Gates that are normalized over a step: in a run, with micro-batches, and in an own loop."""

from collections.abc import Callable

import pytest
import torch

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.losses.gate import SnrGate, gate_weights
from alignlab.own_loop import Clips
from alignlab.train import RunTrainer
from alignlab.training.batches import training_batch
from alignlab.training.own_clips import GivenClips
from alignlab.training.setup import Run, build_run

MakeConfig = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("shared_clips")

GATE = "objectives.ra.gate={kind: snr, tau: 0.4, normalize: true}"


@pytest.fixture
def run(make_config: MakeConfig) -> Run:
    kept = ("flow.text_dropout=0", "flow.reference_dropout=0", "flow.both_dropout=0")
    return build_run(make_config(GATE, *kept, "optim.batch_size=4", "data.references=[1,1]"))


def losses_by_micro_batch(run: Run, accumulate: int) -> tuple[float, list[torch.Tensor]]:
    """The mean weighted loss of a step, and the gradient of a block."""
    config = run.config
    optim = config.optim.model_copy(update={"accumulate": accumulate})
    run.config = config.model_copy(update={"optim": optim})
    trainer = RunTrainer(run)
    (weight, *_) = run.wan.transformer.blocks[0].parameters()
    weight.grad, total = None, 0.0
    batches = list(trainer.micro_batches())
    assert len(batches) == accumulate
    with run.branch:
        for batch in batches:
            aligned = trainer.forward(batch)[1]
            torch.autograd.backward(aligned.loss / accumulate)
            total += aligned.loss.item() / accumulate
    run.config = config
    assert weight.grad is not None
    return total, [weight.grad.clone()]


def test_micro_batches_change_nothing(run: Run) -> None:
    whole, gradient = losses_by_micro_batch(run, 1)
    for accumulate in (2, 4):
        parts, others = losses_by_micro_batch(run, accumulate)
        assert parts == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(others, gradient, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_mean_by_weight_over_the_step(run: Run) -> None:
    (batch,) = RunTrainer(run).micro_batches()
    with run.branch, torch.no_grad():
        aligned = RunTrainer(run).forward(batch)[1]
    weight_B = gate_weights(SnrGate(kind="snr", tau=0.4), batch.sigma_B)
    assert len(set(weight_B.tolist())) == 4
    expected = (weight_B * aligned.terms["ra"].loss_B).sum() / weight_B.sum()
    weight = run.config.objectives["ra"].weight
    assert isinstance(weight, float)
    torch.testing.assert_close(aligned.loss, weight * expected)


def test_every_rank_knows_the_noise_levels_of_the_whole_step(run: Run) -> None:
    made = [
        training_batch(run.clips, run.config.flow, seed=0, step=3, samples=part, whole=range(4))
        for part in (range(4), range(2), range(3, 4))
    ]
    levels = made[0].sigma_B
    for batch, part in zip(made, (levels, levels[:2], levels[3:]), strict=True):
        assert batch.step_sigma_S is not None
        assert torch.equal(batch.step_sigma_S, levels) and torch.equal(batch.sigma_B, part)


def test_an_own_loop_is_asked_for_the_noise_levels_of_the_step(run: Run) -> None:
    objective = run.alignment.objectives["ra"]
    references = [torch.zeros(1, 8, 8, 3, dtype=torch.uint8)]
    clips = Clips(torch.tensor([0.5]), (1, 6, 6), references=references)
    with pytest.raises(UserError, match=r"^objectives\.ra: refalign reads Clips\.step_sigma_S, w"):
        GivenClips(clips, {}).check("ra", objective)
    levels = torch.tensor([0.5, 0.1])
    clips = Clips(torch.tensor([0.5]), (1, 6, 6), references=references, step_sigma_S=levels)
    given = GivenClips(clips, {})
    given.check("ra", objective)
    assert given.step_sigma_S is levels
    with pytest.raises(UserError, match=r"^Clips\.step_sigma_S: "):
        Clips(torch.tensor([0.5]), (1, 6, 6), step_sigma_S=levels[None])
