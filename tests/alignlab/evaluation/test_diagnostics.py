"""Diagnosis of a run: what it says is right, and training does not notice it."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.evaluation.diagnostics import Forward, loss_gradients
from alignlab.evaluation.run_warnings import RankWarnings
from alignlab.metrics.rank import effective_rank
from alignlab.recipe import load_stage1_run, recipe_hash
from alignlab.train import RunTrainer, train
from alignlab.training.batches import Batch
from alignlab.training.measure import StepClock
from alignlab.training.setup import Run, build_run
from run_contents import timeless_rows

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]

LORA = ("model.train=lora", "model.lora.rank=4", "model.lora.alpha=8")
KEPT = ("flow.reference_dropout=0.0", "flow.both_dropout=0.0", "flow.text_dropout=0.0")
SETTINGS = {
    "full": ("optim.accumulate=2", "optim.ema=0.9"),
    "checkpointing": ("model.gradient_checkpointing=true",),
    "lora": LORA,
    "bf16": ("model.precision=bf16",),
}
DIAGNOSED = ("diag/", "grad/ra", "sim/ra/block")


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor of every checkpoint; the order of a file's metadata is left to chance."""
    return {
        f"{path.relative_to(run)}/{name}": tensor.numpy().tobytes()
        for path in run.glob("checkpoints/*/**/*.safetensors")
        for name, tensor in load_file(path).items()
    }


def diagnosed(run: Path) -> list[dict[str, float]]:
    return [row for row in timeless_rows(run) if any(k.startswith(DIAGNOSED) for k in row)]


@pytest.mark.parametrize("kind", SETTINGS)
def test_training_keeps_its_bits(make_config: MakeConfig, kind: str) -> None:
    common = ("steps=3", *KEPT, *SETTINGS[kind])
    plain = train(make_config("name=plain", *common))
    config = make_config("name=looked", "tracking.diagnose_every=2", *common)
    looked = train(config)
    assert weights(plain) and weights(looked) == weights(plain)
    found = diagnosed(looked)
    assert [row["step"] for row in found] == [1, 2]
    for row in found:
        assert row["grad/ra/ratio"] > 0 and -1 <= row["grad/ra/cosine"] <= 1
        assert row.keys() >= {"sim/ra/block0", "sim/ra/block2", "diag/low_ranks"}
        for kind_of_token in ("video", "reference"):
            assert 1 < row[f"diag/rank/{kind_of_token}/block2"] <= 48
    others = [row for row in timeless_rows(looked) if "diag/low_ranks" not in row]
    assert others == timeless_rows(plain)
    assert recipe_hash(config) == recipe_hash(make_config("name=plain", *common))


def test_a_killed_diagnosed_run_ends_as_the_uninterrupted_one(
    make_config: MakeConfig, train_until: TrainUntil
) -> None:
    common = ("steps=5", "checkpoint.every=2", "tracking.diagnose_every=2")
    whole = train(make_config("name=whole", *common))
    killed = make_config("name=killed", *common)
    train_until(killed, 3)
    end = train(killed)
    assert weights(end) == weights(whole)
    assert [row["step"] for row in diagnosed(whole)] == [1, 2, 4]
    for path in (whole, end):
        assert json.loads((path / "result.json").read_text())["notes"] == []
    rows = [timeless_rows(path) for path in (whole, end)]
    assert rows[0] == rows[1]


def forwards(run: Run) -> Iterator[Forward]:
    trainer = RunTrainer(run)
    return trainer.weighted_forwards(list(trainer.micro_batches()))


def gradients(run: Run, batches: list[Batch]) -> dict[str, Tensor]:
    """Gradient of the whole loss, by the backward pass that training runs."""
    for batch in batches:
        total, _ = RunTrainer(run).losses(batch)
        total.backward()
    named = run.wan.transformer.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    run.wan.transformer.zero_grad()
    run.alignment.zero_grad()
    return found


def test_ratio_and_cosine_are_those_of_the_losses_gradients(make_config: MakeConfig) -> None:
    settings = ("objectives.ra.blocks=[1]", "optim.batch_size=4", "optim.accumulate=2")
    run = build_run(make_config(*settings, "objectives.ra.weight=0.7"))
    plain = build_run(make_config(*settings, "objectives.ra.weight=0.0"))
    batches = list(RunTrainer(run).micro_batches())
    with run.branch:
        total = gradients(run, batches)
        found = loss_gradients(run, forwards(run))
        assert all(p.grad is None for p in run.wan.transformer.parameters())
    with plain.branch:
        flow = gradients(plain, batches)
    after = ("blocks.2.", "blocks.3.", "scale_shift_table", "norm_out", "proj_out")
    shared = [name for name in total if not name.startswith(after)]
    assert 0 < len(shared) < len(total)
    ours = torch.cat([(total[name] - flow[name]).flatten() for name in shared]).double()
    theirs = torch.cat([flow[name].flatten() for name in shared]).double()
    assert found["grad/ra/ratio"] == pytest.approx(float(ours.norm() / theirs.norm()), rel=1e-3)
    expected = float(torch.cosine_similarity(ours, theirs, dim=0))
    assert found["grad/ra/cosine"] == pytest.approx(expected, abs=1e-3)


def test_a_batch_with_nothing_to_align_has_ratio_0_and_no_cosine(make_config: MakeConfig) -> None:
    run = build_run(make_config("flow.text_dropout=0.0", "flow.both_dropout=0.0",
                                "flow.reference_dropout=1.0"))  # fmt: skip
    with run.branch:
        found = loss_gradients(run, forwards(run))
    assert found == {"grad/ra/ratio": 0.0}


def test_cosines_by_block_average_to_the_logged_one(make_config: MakeConfig) -> None:
    settings = ["objectives.ra.foreground=0.3"]
    for name in ("repa", "irepa", "align4gen", "crepa"):
        settings += [f"objectives.{name}.{key}" for key in (
            f"name={name}", "teacher=dino", "blocks=[1,3]")]  # fmt: skip
        if name != "irepa":
            settings.append(f"objectives.{name}.projector_dim=16")
    run = build_run(make_config(*settings))
    batches = list(RunTrainer(run).micro_batches())
    with run.branch:
        found = loss_gradients(run, forwards(run))
        with torch.no_grad():
            _, logged = RunTrainer(run).losses(batches[0])
    for alias, blocks in {"ra": (0, 2), **dict.fromkeys(("repa", "irepa", "align4gen", "crepa"),
                                                        (1, 3))}.items():  # fmt: skip
        by_block = [found[f"sim/{alias}/block{block}"] for block in blocks]
        assert sum(by_block) / 2 == pytest.approx(float(logged[f"sim/{alias}"].mean()), abs=1e-5)
        assert by_block[0] != by_block[1]


def test_plain_fine_tuning_is_diagnosed_in_all_blocks(make_config: MakeConfig) -> None:
    config = make_config("steps=1", "tracking.diagnose_every=1", aligned=False)
    (row,) = diagnosed(train(config))
    ranks = {key for key in row if key.startswith("diag/rank/video/")}
    assert ranks == {f"diag/rank/video/block{block}" for block in range(4)}
    assert not [key for key in row if key.startswith("grad/") and key != "grad/norm"]


def test_a_falling_rank_is_warned_of_once_and_noted(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = iter([8.0] * 4 + [4.0] * 4 + [3.9, 8.0, 8.0, 8.0] + [3.0, 8.0, 8.0, 8.0])
    monkeypatch.setattr("alignlab.evaluation.diagnostics.effective_rank", lambda rows: next(ranks))
    with caplog.at_level(logging.WARNING, "alignlab"):
        run = train(make_config("steps=4", "tracking.diagnose_every=1"))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "video tokens of block 0 fell under 50% of its first value" in warning
    assert warning.endswith(" [3.9 of 8 at step 3]")
    assert json.loads((run / "result.json").read_text())["notes"] == [warning]
    assert [row["diag/low_ranks"] for row in diagnosed(run)] == [0, 0, 1, 1]


def test_a_resumed_run_compares_with_its_first_ranks(
    make_config: MakeConfig,
    train_until: TrainUntil,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config("steps=3", "tracking.diagnose_every=3", "checkpoint.every=2")
    monkeypatch.setattr("alignlab.evaluation.diagnostics.effective_rank", lambda rows: 8.0)
    train_until(config, 2)
    monkeypatch.setattr("alignlab.evaluation.diagnostics.effective_rank", lambda rows: 3.0)
    with caplog.at_level(logging.WARNING, "alignlab"):
        run = train(config)
    assert [row["diag/low_ranks"] for row in diagnosed(run)] == [0, 4]
    assert len(caplog.records) == 4


def test_warnings_of_a_resumed_run_know_what_was_logged_before() -> None:
    key = "diag/rank/video/block1"
    rows = [{"step": 1.0, key: 10.0, "loss/flow": 1.0}, {"step": 5.0, "loss/flow": 0.1}]
    warnings = RankWarnings(rows)
    assert warnings.see(9, {key: 5.0}) == []
    assert len(warnings.see(10, {key: 4.9})) == 1
    assert RankWarnings([*rows, {"step": 10.0, key: 4.9}]).see(11, {key: 4.0}) == []


def test_stage_1_has_no_such_setting() -> None:
    with pytest.raises(UserError, match=r"tracking\.diagnose_every"):
        load_stage1_run("sara", "stage1_sara", ["tracking.diagnose_every=5"])


def test_the_time_of_a_diagnosis_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("alignlab.training.measure.time.perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))
    clock.step_begins()
    with clock.making_data():
        now[0] = 1.0
    with clock.paused():
        now[0] = 100.0
    now[0] = 103.0
    assert clock.lap() == {"time/step": 3.0, "time/data": 1.0}


def test_effective_rank() -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    assert effective_rank(torch.eye(6)[:, :4]) == pytest.approx(4)
    rows = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(rows) == pytest.approx(expected)
    assert effective_rank(7 * rows @ turn) == pytest.approx(expected)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    noise = 1e-4 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert effective_rank(1 + noise) == pytest.approx(1, abs=0.02)
    assert effective_rank(torch.zeros(3, 3)) == 0
