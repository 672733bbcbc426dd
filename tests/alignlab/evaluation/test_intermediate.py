"""Evaluations during a training: what they leave behind, and that they change nothing of it."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.run import RunConfig
from alignlab.evaluation.evaluate import validation_flow
from alignlab.recipe import load_run
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import Tracker
from alignlab.train import train
from alignlab.training.setup import Run
from kills import Killed
from run_contents import timeless_contents, timeless_metrics, timeless_rows

pytestmark = pytest.mark.usefixtures("shared_clips")

MakeConfig = Callable[..., RunConfig]
TrainUntil = Callable[[RunConfig, int], None]
Told = list[tuple[int, dict[str, float]]]

BASE = (
    "steps=8",
    "optim.ema=0.9",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "eval.clips=2",
    "eval.sample_clips=1",
    "tracking.log_every=3",
)
EVERY = ("eval.every=2", "eval.sample_every=3")


def evaluation_rows(run: Path) -> list[dict[str, float]]:
    return [r for r in timeless_rows(run) if any(k.startswith(("val/", "gen/")) for k in r)]


def training_rows(run: Path) -> list[dict[str, float]]:
    return [row for row in timeless_rows(run) if row not in evaluation_rows(run)]


@pytest.fixture(scope="module")
def pair(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Told]:
    """A run without and one with evaluations, and what the second one told."""
    told: Told = []
    output = f"output={tmp_path_factory.mktemp('pair')}"
    plain = train(load_run(recipe_file, [output, "name=plain", *BASE]))
    watched = train(
        load_run(recipe_file, [output, "name=watched", *BASE, *EVERY]),
        on_evaluation=lambda step, metrics: told.append((step, dict(metrics))),
    )
    return plain, watched, told


def test_training_keeps_its_bits(pair: tuple[Path, Path, Told]) -> None:
    plain, watched, _ = pair
    one, two = (timeless_contents(run / "checkpoints") for run in (plain, watched))
    assert {Path(name).parts[0] for name in one} == {"step-000003", "step-000006", "step-000008"}
    assert one == two
    assert training_rows(plain) == training_rows(watched)
    assert timeless_metrics(plain) == timeless_metrics(watched)
    final = evaluation_rows(plain)
    assert final == evaluation_rows(watched)[-1:] and final[0]["step"] == 8


def test_rows_and_samples_lie_with_their_step(pair: tuple[Path, Path, Told]) -> None:
    _, watched, told = pair
    rows = {int(row["step"]): row.keys() - {"step"} for row in evaluation_rows(watched)}
    assert list(rows) == [2, 3, 4, 6, 8]
    generated = {name for name in rows[8] if name.startswith(("gen/", "gen_real/"))}
    validated = {n for n in rows[8] if n not in generated and not n.startswith("params/")}
    assert generated and {"val/flow/t9", "cknna/block2", "silhouette/mean"} <= validated
    assert rows[2] == rows[4] == validated
    assert rows[3] == generated
    assert rows[6] == validated | generated
    flows = [row["val/flow"] for row in evaluation_rows(watched) if "val/flow" in row]
    assert len(set(flows)) == 4
    samples = watched / "samples"
    assert sorted(p.name for p in samples.iterdir() if p.is_dir()) == ["step-000003", "step-000006"]
    for folder in (samples, samples / "step-000003", samples / "step-000006"):
        (clip,) = json.loads((folder / "samples.json").read_text())
        assert (folder / clip["video"]).is_file()
    assert told == [
        (int(row["step"]), {k: v for k, v in row.items() if k != "step"})
        for row in evaluation_rows(watched)[:-1]
    ]


def test_a_finished_run_tells_of_its_evaluations(pair: tuple[Path, Path, Told]) -> None:
    _, watched, told = pair
    again: Told = []
    train(
        RunFolder(watched).config(),
        on_evaluation=lambda step, metrics: again.append((step, dict(metrics))),
    )
    assert again == told and [step for step, _ in told] == [2, 3, 4, 6]


def test_costs_leave_evaluations_out(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only evaluations move, by 1000 s each."""
    now = [0.0]
    monkeypatch.setattr("alignlab.training.measure.time.perf_counter", lambda: now[0])

    def slow(step: int, metrics: Mapping[str, float]) -> None:
        now[0] += 1000.0

    config = make_config("steps=4", "eval.every=1", "tracking.log_every=2", aligned=False)
    train(config, on_evaluation=slow)
    assert now[0] == 3000.0
    rows = read_rows(RunFolder(Path(config.output) / config.name).metrics)
    assert [row["time/step"] for row in rows if "time/step" in row] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("at", [4, 5, 6])
def test_a_killed_run_ends_with_the_same_rows(
    pair: tuple[Path, Path, Told],
    make_config: MakeConfig,
    train_until: TrainUntil,
    tmp_path: Path,
    at: int,
) -> None:
    """Killed after evaluations that its checkpoint of step 3 does not know, and at that of 6."""
    _, watched, told = pair
    config = make_config(*BASE, *EVERY)
    train_until(config, at)
    again: Told = []
    train(config, on_evaluation=lambda step, metrics: again.append((step, dict(metrics))))
    run = tmp_path / "run"
    assert timeless_rows(run) == timeless_rows(watched)
    assert timeless_contents(run / "samples") == timeless_contents(watched / "samples")
    assert timeless_metrics(run) == timeless_metrics(watched)
    assert again == told


def test_an_evaluation_that_was_killed_is_made_up_for(
    pair: tuple[Path, Path, Told], make_config: MakeConfig, tmp_path: Path
) -> None:
    """Killed between the checkpoint of a step and the row of its evaluation."""
    _, watched, _ = pair
    log = Tracker.log

    def dying(tracker: Tracker, step: int, scalars: Mapping[str, float]) -> None:
        if step == 6 and "val/flow" in scalars:
            raise Killed
        log(tracker, step, scalars)

    config = make_config(*BASE, *EVERY)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Tracker, "log", dying)
        train(config)
    train(config)
    assert timeless_rows(tmp_path / "run") == timeless_rows(watched)


def test_what_the_hook_raises_ends_a_run_that_can_be_resumed_at_another_cadence(
    pair: tuple[Path, Path, Told], make_config: MakeConfig, tmp_path: Path
) -> None:
    class Pruned(Exception):
        pass

    def prune(step: int, metrics: Mapping[str, float]) -> None:
        if step == 4:
            raise Pruned

    with pytest.raises(Pruned):
        train(make_config(*BASE, *EVERY), on_evaluation=prune)
    run = tmp_path / "run"
    assert [row["step"] for row in evaluation_rows(run)] == [2, 3, 4]
    with pytest.raises(Pruned):  # told again
        train(make_config(*BASE, *EVERY), on_evaluation=prune)
    plain, _, _ = pair
    train(make_config(*BASE, "eval.every=5"))
    assert [row["step"] for row in evaluation_rows(run)] == [2, 3, 5, 8]
    assert timeless_metrics(run) == timeless_metrics(plain)
    assert timeless_contents(run / "checkpoints") == timeless_contents(plain / "checkpoints")


def test_a_validation_loss_that_is_not_finite_is_told_and_ends_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(run: Run, *args: Any) -> dict[str, float]:
        found = validation_flow(run, *args)
        return dict.fromkeys(found, math.nan) if run.state.step == 1 else found

    monkeypatch.setattr("alignlab.evaluation.evaluate.validation_flow", broken)
    told: Told = []
    run = train(
        make_config("steps=2", "eval.every=1", aligned=False),
        on_evaluation=lambda step, metrics: told.append((step, dict(metrics))),
    )
    assert "step 1: not finite: val/flow" in caplog.text
    ((step, metrics),) = told
    assert step == 1 and all(map(math.isnan, metrics.values()))
    assert math.isfinite(timeless_metrics(run)["val/flow"])
