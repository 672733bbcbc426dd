"""Objectives that a schedule turns off: what a plateau sees, what is skipped, what resumes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.config.run import RunConfig
from alignlab.losses.objective import Features, Terms
from alignlab.losses.repa import Repa
from alignlab.runs.checkpoint_folders import latest
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.train import RunTrainer, train
from alignlab.training.setup import build_run
from alignlab.training.teacher_features import teacher_features

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]

REPA = (
    "objectives.repa.name=repa",
    "objectives.repa.teacher=dino",
    "objectives.repa.blocks=[3]",
    "objectives.repa.projector_dim=32",
)
# nothing after the first step is a new best
AT_ONCE = "{kind: stop_at_plateau, decay: 0.0, patience: 2, min_delta: 9.0}"
KEPT = ("flow.reference_dropout=0", "flow.both_dropout=0")


def count_teacher_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    kinds: list[str] = []

    def counted(*args: Any, **options: Any) -> Features:
        kinds.append(args[2])
        return teacher_features(*args, **options)

    monkeypatch.setattr("alignlab.training.alignment.teacher_features", counted)
    return kinds


def column(run: Path, key: str) -> list[float | None]:
    """The key's value in every row of a training step."""
    rows = read_rows(run / "metrics.jsonl")
    return [row.get(key) for row in rows if "loss/total" in row]


def tensors(run: Path, file: str) -> dict[str, torch.Tensor]:
    newest = latest(run / "checkpoints")
    assert newest is not None
    return load_file(newest / file)


def test_a_plateau_turns_its_objective_off_and_saves_its_teacher_pass(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_teacher_passes(monkeypatch)
    config = make_config("steps=5", *REPA, f"objectives.repa.schedule={AT_ONCE}", *KEPT)
    run = train(config)
    assert column(run, "schedule/repa") == [1.0, 1.0, 1.0, 0.0, 0.0]
    for key in ("loss/repa", "loss/repa/align", "sim/repa", "watched/repa"):
        assert [value is not None for value in column(run, key)] == [True] * 3 + [False] * 2
    assert column(run, "watched/repa") == column(run, "sim/repa")
    assert "schedule/ra" not in read_rows(run / "metrics.jsonl")[1]  # constant
    assert None not in column(run, "loss/ra")
    assert passes == ["reference", "video"] * 3 + ["reference"] * 2
    state = tensors(run, "objectives.safetensors")
    assert int(state["stop_repa.waited"]) == 2


def test_a_teacher_still_runs_for_the_objective_that_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_teacher_passes(monkeypatch)
    other = [setting.replace("objectives.repa", "objectives.other") for setting in REPA]
    stop = "objectives.repa.schedule={kind: stop_at, step: 1}"
    run = train(make_config("steps=3", *REPA, stop, *other, "objectives.other.weight=0.5", *KEPT))
    assert passes == ["reference", "video"] * 3
    assert [v is not None for v in column(run, "loss/repa")] == [True, False, False]
    assert None not in column(run, "loss/other")


def test_a_stopped_objective_leaves_what_plain_training_would_do(make_config: MakeConfig) -> None:
    never = make_config("steps=3", "objectives.ra.schedule={kind: stop_at, step: 0}", "name=never")
    plain = train(make_config("steps=3", aligned=False))
    folder = RunFolder.create(never)  # not by `train`, which refuses what trains nothing
    RunTrainer(build_run(never)).fit(folder, None)
    stopped = folder.path
    weights = "transformer/diffusion_pytorch_model.safetensors"
    one, two = tensors(plain, weights), tensors(stopped, weights)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert column(plain, "grad/norm") == column(stopped, "grad/norm")


def test_accumulation_rounds_are_seen_as_one_step(make_config: MakeConfig) -> None:
    # rounds differ in how many samples still have references
    shared = ["steps=4", "optim.batch_size=4", "flow.reference_dropout=0.5", "optim.lr=1e-4"]
    shared.append("objectives.ra.schedule={kind: stop_at_plateau, decay: 0.7, patience: 90}")
    whole = train(make_config(*shared))
    split = train(make_config(*shared, "optim.accumulate=4", "name=split"))
    seen = [value for value in column(whole, "watched/ra") if value is not None]
    assert len(seen) > 1 and len(set(seen)) == len(seen)
    assert column(whole, "watched/ra") == column(whole, "sim/ra")
    one, two = (tensors(run, "objectives.safetensors") for run in (whole, split))
    average = seen[0]
    for value in seen[1:]:
        average = 0.7 * average + 0.3 * value
    assert float(one["stop_ra.average"]) == pytest.approx(average, rel=1e-6)
    assert float(two["stop_ra.average"]) == pytest.approx(average, rel=1e-4)
    assert int(one["stop_ra.waited"]) == int(two["stop_ra.waited"])


def test_a_step_without_a_reference_is_not_seen(make_config: MakeConfig) -> None:
    dropped = ["flow.reference_dropout=1.0", "flow.text_dropout=0", "flow.both_dropout=0"]
    run = build_run(make_config(*dropped, f"objectives.ra.schedule={AT_ONCE}"))
    with run.branch:
        for _ in range(4):
            scalars = RunTrainer(run).step(RunTrainer(run).micro_batches())
    assert "watched/ra" not in scalars and float(scalars["schedule/ra"]) == 1.0
    assert run.alignment.weights.watches["ra"].average.isnan()


def test_an_objective_without_similarity_is_watched_by_its_loss(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Repa.forward

    def without_similarity(*args: Any) -> Terms:
        return replace(forward(*args), similarity_B=None)

    monkeypatch.setattr(Repa, "forward", without_similarity)
    run = train(make_config("steps=4", *REPA, f"objectives.repa.schedule={AT_ONCE}"))
    losses, watched = column(run, "loss/repa"), column(run, "watched/repa")
    assert [value is not None for value in losses] == [True] * 3 + [False]
    assert watched == [None if value is None else -value for value in losses]


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_killed_run_stops_where_the_uninterrupted_one_stops(
    make_config: MakeConfig, train_until: TrainUntil, killed_at: int
) -> None:
    plateau = "{kind: stop_at_plateau, decay: 0.9, patience: 2, min_delta: 9.0, start: 1}"
    shared = ["steps=6", *REPA, f"objectives.repa.schedule={plateau}", "checkpoint.every=1"]
    whole, config = train(make_config(*shared)), make_config(*shared, "name=killed")
    train_until(config, killed_at)
    resumed = train(config)
    assert column(whole, "schedule/repa") == [1.0] * 4 + [0.0] * 2
    for key in ("schedule/repa", "watched/repa", "loss/total", "loss/ra", "grad/norm"):
        assert column(resumed, key) == column(whole, key)
    for file in ("objectives.safetensors", "optimizer.safetensors"):
        one, two = tensors(whole, file), tensors(resumed, file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
