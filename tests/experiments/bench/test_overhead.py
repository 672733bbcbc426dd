"""What the harness costs: both sides do the same work and are timed in turns, by one stopwatch."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.bench import overhead
from alignlab.experiments.bench.overhead import WARMUP_PAIRS, measure_overhead, write_overhead
from alignlab.experiments.compare import measure as stopwatch
from alignlab.experiments.compare.measure import seconds_of
from alignlab.recipe import load_run
from alignlab.train import Trainer
from alignlab.training.batches import Batch
from alignlab.training.setup import Run
from alignlab.training.step_terms import StepScalars

NO_DROPOUT = "flow={text_dropout: 0, reference_dropout: 0, both_dropout: 0}"
EQUAL_WORK = ["data.references=[2,2]", "model.text_to_references=true", NO_DROPOUT]


@pytest.fixture
def config(recipe_file: Path) -> RunConfig:
    """Plain fine-tuning that a bare loop can do as well."""
    return load_run(recipe_file, EQUAL_WORK).model_copy(update={"objectives": {}})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_both_sides_train_alike_and_take_turns(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock that only the two steps move, by three seconds and by two."""
    now, sides, models, starts = 0.0, list[str](), list[nn.Module](), list[Tensor]()

    def copied(model: nn.Module) -> nn.Module:
        models[:] = [model, copy.deepcopy(model)]
        starts.append(weights(model))
        return models[1]

    take_step = Trainer.step

    def harness(trainer: Trainer, batches: list[Batch]) -> StepScalars:
        nonlocal now
        now += 3.0
        sides.append("harness")
        return take_step(trainer, batches)

    def bare_step(run: Run) -> Callable[..., None]:
        step = original(run)

        def bare(*arguments: Any) -> None:
            nonlocal now
            now += 2.0
            sides.append("bare")
            step(*arguments)

        return bare

    original = overhead.bare_step
    monkeypatch.setattr(overhead, "copy", SimpleNamespace(deepcopy=copied))
    monkeypatch.setattr(Trainer, "step", harness)
    monkeypatch.setattr(overhead, "bare_step", bare_step)
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now))
    found = measure_overhead(config, pairs=3)
    assert (found.harness_s, found.bare_s, found.ratio, found.pairs) == (3.0, 2.0, 1.5, 3)
    assert sides == ["bare", "harness", "harness", "bare"] * ((WARMUP_PAIRS + 3) // 2)
    harness_weights, bare_weights = (weights(model) for model in models)
    moved = (bare_weights - starts[0]).abs().max()
    assert (harness_weights - bare_weights).abs().max() < 1e-3 * moved
    write_overhead(found, tmp_path / "deep" / "overhead.json")
    assert json.loads((tmp_path / "deep" / "overhead.json").read_text())["ratio"] == 1.5


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("data.references=[2,3]", "data.references"),
        ("flow.text_dropout=0.1", "flow.text_dropout"),
        ("model.text_to_references=false", "model.text_to_references"),
        ("optim.accumulate=2", "optim.accumulate"),
        ("optim.ema=0.9", "optim.ema"),
    ],
)
def test_unequal_work_is_refused(recipe_file: Path, setting: str, named: str) -> None:
    config = load_run(recipe_file, [*EQUAL_WORK, setting]).model_copy(update={"objectives": {}})
    with pytest.raises(UserError, match=rf"^{named}.*: the bare loop would do other work"):
        measure_overhead(config)


def test_objectives_are_refused(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"^objectives: the bare loop would do other work"):
        measure_overhead(load_run(recipe_file, EQUAL_WORK))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_clock_waits_for_a_gpu_and_for_nothing_else(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU is still busy with before does not count, what the work left it to do does."""
    now, queued = 0.0, 5.0

    def work() -> None:
        nonlocal now, queued
        now, queued = now + 1.0, queued + 7.0

    def synchronize(device: torch.device) -> None:
        nonlocal now, queued
        now, queued = now + queued, 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now))
    assert seconds_of(work, torch.device(kind)) == (8.0 if kind == "cuda" else 1.0)
