"""Weights that are a share of the flow loss's gradient, in real trainings."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.losses.gate import gate_weights
from alignlab.losses.objective import Terms
from alignlab.losses.refalign import RefAlign
from alignlab.model_card import model_card
from alignlab.runs.checkpoint_folders import latest
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.train import RunTrainer, train
from alignlab.training.setup import Run, build_run

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]

KEPT = ("flow.reference_dropout=0.3", "flow.both_dropout=0", "optim.batch_size=4")
SHARES = {"ra": 0.1, "repa": 0.4}
REPA = "objectives.repa={name: repa, teacher: dino, blocks: [3], projector_dim: 32, gate: t^3}"


def shares(steps: int) -> list[str]:
    """Two objectives on other blocks, other tokens and with other gates."""
    weights = [
        f"objectives.{alias}.weight={{gradient_share: {share}, steps: {steps}}}"
        for alias, share in SHARES.items()
    ]
    return [REPA, *weights, *KEPT]


@contextmanager
def caught_outputs(run: Run) -> Iterator[dict[int, list[Tensor]]]:
    """What all blocks put out, by hooks of the test's own; gradients stay there."""
    caught: dict[int, list[Tensor]] = {}

    def hook(block: int) -> Callable[..., None]:
        def catch(module: object, inputs: object, output: Tensor) -> None:
            output.retain_grad()
            caught.setdefault(block, []).append(output)

        return catch

    blocks = enumerate(run.wan.transformer.blocks)
    handles = [module.register_forward_hook(hook(block)) for block, module in blocks]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def norms_by_autograd(config: RunConfig) -> dict[str, tuple[float, float]]:
    """Norms, at each objective's blocks, of the gradients of the first step's mean flow loss and of
    the objective's mean loss: by one backward pass each of the whole batch."""
    run = build_run(config)
    trainer = RunTrainer(run)
    (batch,) = trainer.micro_batches()
    with run.branch, caught_outputs(run) as caught:
        flow_B, aligned, _ = trainer.forward(batch)
    flow = (run.flow_weights(batch.sigma_B) * flow_B).mean()
    own = {
        alias: (gate_weights(o.gate, batch.sigma_B) * aligned.terms[alias].loss_B).mean()
        for alias, o in config.objectives.items()
    }

    def norm(loss: Tensor, blocks: tuple[int, ...]) -> float:
        for outputs in caught.values():
            for output in outputs:
                output.grad = None
        loss.backward(retain_graph=True)
        gradients = [output.grad for block in blocks for output in caught[block]]
        squares = [float(g.double().square().sum()) for g in gradients if g is not None]
        return math.sqrt(sum(squares))

    return {
        alias: (norm(flow, o.blocks), norm(own[alias], o.blocks))
        for alias, o in config.objectives.items()
    }


def taken(run: Run, steps: int) -> list[dict[str, float]]:
    """The rows of a training's first steps, without an evaluation."""
    trainer = RunTrainer(run)
    with run.branch:
        rows = [dict(trainer.step(trainer.micro_batches())) for _ in range(steps)]
    return [{key: float(value) for key, value in row.items()} for row in rows]


@pytest.mark.parametrize(
    "settings",
    [
        ("flow.weighting=wan_gaussian",),
        ("optim.accumulate=2", "model.gradient_checkpointing=true"),
        ("optim.accumulate=2", "model.train=lora", "model.lora.rank=4"),
    ],
)
def test_the_share_is_that_of_plain_autograd(
    make_config: MakeConfig, settings: tuple[str, ...]
) -> None:
    plain = [one for one in settings if "accumulate" not in one and "checkpointing" not in one]
    norms = norms_by_autograd(make_config(*shares(1), *plain))
    rows = taken(build_run(make_config(*shares(1), *settings)), 2)
    for alias, share in SHARES.items():
        flow, own = norms[alias]
        assert flow > 0 and own > 0
        assert rows[0][f"weight/{alias}"] == 0.0
        weight = rows[1][f"weight/{alias}"]
        assert weight * own / flow == pytest.approx(share, rel=1e-4)
        assert f"gradient_share/{alias}" in rows[0] and f"gradient_share/{alias}" not in rows[1]


def column(run: Path, key: str) -> list[float | None]:
    """The key's value in every row of a training step."""
    rows = read_rows(run / "metrics.jsonl")
    return [row.get(key) for row in rows if "loss/total" in row]


def tensors(run: Path, file: str) -> dict[str, Tensor]:
    newest = latest(run / "checkpoints")
    assert newest is not None
    return load_file(newest / file)


def test_a_hundredfold_loss_trains_the_same(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("objectives.ra.weight={gradient_share: 0.5, steps: 2}", *KEPT[1:])
    one = build_run(config)
    rows = taken(one, 4)
    forward = RefAlign.forward

    def hundredfold(*args: Any) -> Terms:
        terms = forward(*args)
        return replace(terms, loss_B=100 * terms.loss_B)

    monkeypatch.setattr(RefAlign, "forward", hundredfold)
    other = build_run(config)
    for here, there in zip(rows, taken(other, 4), strict=True):
        assert there["weight/ra"] == pytest.approx(here["weight/ra"] / 100, rel=1e-4)
        assert there["loss/flow"] == pytest.approx(here["loss/flow"], rel=1e-5)
        assert there.get("gradient_share/ra", -1.0) == pytest.approx(
            here.get("gradient_share/ra", -1.0), rel=1e-4
        )
    weights = [row["weight/ra"] for row in rows]
    assert weights[0] == 0.0 and weights[1] != weights[2] and weights[2] == weights[3]
    assert [row.get("gradient_share/ra", -1.0) > 0.1 for row in rows] == [False, True, False, False]
    for mine, theirs in zip(one.state.names, other.state.names, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=2e-5)


def test_a_run_killed_while_it_measures_goes_on_as_if_it_had_not_been(
    make_config: MakeConfig, train_until: TrainUntil
) -> None:
    settings = ["steps=5", *shares(3), "checkpoint.every=2", "objectives.repa.warmup=3"]
    whole, config = train(make_config(*settings)), make_config(*settings, "name=killed")
    train_until(config, 3)
    resumed = train(config)
    for alias in SHARES:
        for key in (f"weight/{alias}", f"gradient_share/{alias}", "loss/total", "grad/norm"):
            assert column(resumed, key) == column(whole, key)
        in_force = column(whole, f"weight/{alias}")
        assert in_force[0] == 0.0 and len(set(in_force)) == 4 and in_force[3] == in_force[4]
    for file in ("objectives.safetensors", "optimizer.safetensors"):
        one, two = tensors(whole, file), tensors(resumed, file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    result = RunFolder(whole).read_result() or {}
    for alias, share in SHARES.items():
        found = result["weights"][alias]
        assert found == {"weight": column(whole, f"weight/{alias}")[-1], "steps": 3}
        card = model_card(RunFolder(whole))
        assert f"gradient share {share}, measured in 3 steps: {found['weight']:.3g}" in card


def test_a_number_writes_what_it_wrote(full_run: Path) -> None:
    rows = read_rows(full_run / "metrics.jsonl")
    assert not any(key.startswith(("weight/", "gradient_share/")) for row in rows for key in row)
    assert "weights" not in (RunFolder(full_run).read_result() or {})
    assert not any(
        name.startswith("weight_") for name in tensors(full_run, "objectives.safetensors")
    )


def test_a_schedule_and_a_warmup_come_on_top(make_config: MakeConfig) -> None:
    settings = ["objectives.ra.weight={gradient_share: 0.5, steps: 2}", *KEPT[1:]]
    settings.append("optim.lr=1e-12")  # losses depend on the clips alone
    stop = "objectives.ra.schedule={kind: stop_at, step: 3}"
    plain = taken(build_run(make_config(*settings)), 3)
    *changed, last = taken(build_run(make_config(*settings, "objectives.ra.warmup=4", stop)), 4)
    assert last["schedule/ra"] == 0.0 and "weight/ra" not in last
    for number, (one, other) in enumerate(zip(plain, changed, strict=True), 1):
        weight = one["weight/ra"]
        assert other["weight/ra"] == pytest.approx(weight, rel=1e-5)
        for row, factor in ((one, 1.0), (other, number / 4)):
            added = row["loss/total"] - row["loss/flow"]
            assert added == pytest.approx(factor * weight * row["loss/ra"], rel=1e-3)


def test_a_loss_without_a_gradient_is_refused_by_its_name(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = RefAlign.forward

    def flat(*args: Any) -> Terms:
        terms = forward(*args)
        return replace(terms, loss_B=0 * terms.loss_B + 1)

    monkeypatch.setattr(RefAlign, "forward", flat)
    config = make_config("steps=3", "objectives.ra.weight={gradient_share: 0.1, steps: 2}", *KEPT)
    with pytest.raises(UserError, match=r"^objectives\.ra\.weight: its loss had no gradient in .*"):
        train(config)


def test_a_block_before_all_trained_weights_is_refused(make_config: MakeConfig) -> None:
    lora = ["model.train=lora", "model.lora.rank=4", "model.lora.targets=[blocks.3.attn1.to_q]"]
    run = build_run(make_config(*shares(1), *lora))
    expected = r"^objectives\.ra\.weight: .* output of block 0, which carries no gradient: train"
    with pytest.raises(UserError, match=expected):
        taken(run, 1)
