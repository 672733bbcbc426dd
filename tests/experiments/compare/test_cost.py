"""What a step of each variant costs: counted, timed in one process, told with its interval."""

import doctest
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from alignlab.errors import UserError
from alignlab.experiments.compare import cost as cost_module
from alignlab.experiments.compare import measure as stopwatch
from alignlab.experiments.compare.config import CompareConfig, dump_compare, load_compare
from alignlab.experiments.compare.cost import DATA_STEPS, cost_of, measure_cost, median_interval
from alignlab.experiments.compare.result import Comparison, Cost, Ratio, RunResult, VariantCost
from alignlab.experiments.compare.run import compare
from alignlab.experiments.report.summary import summary_rows
from alignlab.experiments.report.text import print_summary
from alignlab.experiments.report.verdict import verdict
from alignlab.experiments.report.write import write_report
from alignlab.train import RunTrainer, Trainer
from alignlab.training.batches import Batch
from alignlab.training.step_terms import StepScalars
from made_comparisons import make_comparison
from run_contents import read_table
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

Make = Callable[..., CompareConfig]

VARIANTS = """
baseline: none
seeds: [0]
cost: {rounds: 6}
variants:
  none: {}
  aligned:
    objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2]}
  heavy: {optim.batch_size: 20}
"""


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison_recipe(recipe_file, tmp_path_factory.mktemp("cost") / "dear.yaml", VARIANTS)


@pytest.fixture
def make(recipe: Path, tmp_path: Path) -> Make:
    return lambda *overrides: load_compare(recipe, [f"output={tmp_path}", *overrides])


take_step = Trainer.step


@dataclass
class Clock:
    """Stands for the wall clock: a step takes a second per sample, times a factor of its clips.

    The first step of a model beside another takes a minute more.
    """

    now: float = 0.0
    steps: list[tuple[Trainer, float]] = field(default_factory=list)
    """The model that took each step, and the factor."""

    def step(self, trainer: Trainer, batches: list[Batch]) -> StepScalars:
        factor = 1.0 + float(batches[0].noise_BCTHW[0].abs().mean())
        if sum(other is trainer for other, _ in self.steps) == 1 + DATA_STEPS:
            self.now += 60.0
        self.now += factor * sum(len(batch.sigma_B) for batch in batches)
        self.steps.append((trainer, factor))
        return take_step(trainer, batches)


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def measured(recipe: Path, clock: Clock, tmp_path_factory: pytest.TempPathFactory) -> Cost:
    output = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", lambda trainer, batches: clock.step(trainer, batches))
        patch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        cost = measure_cost(load_compare(recipe, [f"output={output}"]))
    assert not list(output.iterdir()), "measuring leaves the run folders alone"
    return cost


def test_a_dearer_step_is_measured_against_a_copy_of_the_baseline(
    measured: Cost, clock: Clock
) -> None:
    base, aligned, heavy = (measured.variants[v] for v in ("none", "aligned", "heavy"))
    assert (base.slower, measured.rounds, measured.device) == (Ratio(1.0), 6, "cpu")
    for variant, slower in ((aligned, 1.0), (heavy, 10.0)):
        ratio = variant.slower
        assert (ratio.low, ratio.value, ratio.high) == pytest.approx((slower,) * 3), "by the round"
        assert ratio.beyond == measured.beyond == pytest.approx(0.0)
    factors = {factor for _, factor in clock.steps}
    assert len(factors) == DATA_STEPS and 2 * min(factors) < base.seconds < 2 * max(factors)
    assert heavy.seconds == pytest.approx(10 * base.seconds)
    # text encoder and autoencoder are no part of a step
    assert heavy.flops == pytest.approx(10 * base.flops, rel=0.2)
    assert base.flops < aligned.flops < 2 * base.flops
    assert base.parameters == heavy.parameters < aligned.parameters
    assert base.memory_mib is None, "a CPU process cannot tell its models apart"


def test_both_sides_take_turns_on_the_same_clips(measured: Cost, clock: Clock) -> None:
    steps = iter(clock.steps)
    alone = [next(steps) for _ in range(1 + DATA_STEPS)]
    base = alone[0][0]
    for _ in ("a copy of the baseline", "aligned", "heavy"):
        other, *others = (run for run, _ in [next(steps) for _ in range(1 + DATA_STEPS)])
        assert other is not base and {*map(id, others)} == {id(other)}
        rounds = [[next(steps), next(steps)] for _ in range(1 + measured.rounds)]
        sides = [[run is base for run, _ in taken] for taken in rounds]
        assert sides == [[False, True], [True, False]] * 3 + [[False, True]]
        factors = [{factor for _, factor in taken} for taken in rounds]
        assert [len(found) for found in factors] == [1] * len(rounds)
        assert factors[:DATA_STEPS] == [{factor} for _, factor in alone[1:]]
    assert list(steps) == []


def test_a_schedule_does_not_hide_its_objective(make: Make, measured: Cost) -> None:
    """Objectives that stop at once or on a plateau are measured while they are on, and those whose
    weight is measured in the first steps as in all later ones."""
    aligned = "{name: refalign, teacher: dino, blocks: [0, 2], schedule: %s}"
    plateau = aligned % "{kind: stop_at_plateau, patience: 1, min_delta: 9}"
    heavy = f"variants.heavy={{optim: {{batch_size: 2}}, objectives: {{ra: {plateau}}}}}"
    at_once = "variants.aligned.objectives.ra.schedule={kind: stop_at, step: 1}"
    share = "variants.aligned.objectives.ra.weight={gradient_share: 0.1}"
    found = measure_cost(make(at_once, share, heavy)).variants
    assert found["none"].flops == measured.variants["none"].flops
    for variant in ("aligned", "heavy"):
        assert found[variant].flops == measured.variants["aligned"].flops


def test_every_side_computes_in_its_own_precision(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def watched(trainer: RunTrainer, batches: Any) -> StepScalars:
        with trainer.run.autocast():
            computed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.add((trainer.config.model.precision, computed))
        return take_step(trainer, batches)

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(cost_module, "DATA_STEPS", 1)
    measure_cost(make("variants.heavy={model: {precision: bf16}}"))
    assert seen == {("fp32", None), ("bf16", torch.bfloat16)}


def test_the_cost_is_kept_and_used_again(
    make: Make, measured: Cost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(config: CompareConfig) -> Cost:
        calls.append(config)
        return measured

    monkeypatch.setattr(cost_module, "measure_cost", counted)
    assert cost_of(make(), tmp_path) == cost_of(make(), tmp_path) == measured
    same = ["steps=8", "seeds=[0,1]", "eval.clips=3", "checkpoint.every=1", "tracking.log_every=2"]
    assert cost_of(make(*same), tmp_path) == measured
    assert len(calls) == 1
    changed = ["cost.rounds=7", "variants.heavy.optim.lr=1", "baseline=heavy", "seeds=[1]"]
    for others in ([change] for change in changed):
        before = len(calls)
        cost_of(make(*others), tmp_path)
        assert len(calls) == before + 1, others
    assert cost_of(make("cost=null"), tmp_path) is None
    kept = (tmp_path / "cost.json").read_text()
    (tmp_path / "cost.json").write_text(kept.replace('"rounds": 6', '"rounds": 60'))
    with pytest.raises(UserError, match=r"cost\.json.* remove it: the cost is then measured again"):
        cost_of(make(), tmp_path)
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(UserError, match=r"cost\.json is damaged \(it holds no measured cost\): "):
        cost_of(make(), tmp_path)


def test_no_memory_for_two_models_leaves_the_cost_out(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(config: CompareConfig) -> Cost:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cost_module, "measure_cost", full)
    assert cost_of(make(), tmp_path) is None
    assert "do not fit into memory together; set cost=null" in caplog.text
    assert not (tmp_path / "cost.json").exists()


def test_a_comparison_measures_its_cost_and_shows_it(make: Make, tmp_path: Path) -> None:
    report = compare(make("variants.heavy.optim.batch_size=2"))
    kept = json.loads((tmp_path / "dear" / "cost.json").read_text())
    found = Comparison.load(report.parent / "comparison.json")
    assert found.cost is not None and found.cost.variants.keys() == {"none", "aligned", "heavy"}
    assert kept["cost"]["variants"]["aligned"]["seconds"] == found.cost.variants["aligned"].seconds
    text = report.read_text()
    assert "step time, interleaved (s)" in text and "GFLOP per step" in text
    headline = {row.metric for row in summary_rows(found) if row.headline}
    assert {"cost/step", "cost/gflop", "memory/peak_mib"} <= headline
    assert "time/step" not in headline


@pytest.mark.parametrize("bad", ["cost.rounds=5", "cost.round=6", "cost=7"])
def test_wrong_settings_are_named(make: Make, bad: str) -> None:
    with pytest.raises(UserError, match=r"^cost"):
        make(bad)
    assert make("cost=null").cost is None


def test_the_dump_keeps_that_nothing_is_measured(make: Make, tmp_path: Path) -> None:
    again = tmp_path / "again.yaml"
    again.write_text(dump_compare(make("cost=null")))
    assert load_compare(again).cost is None


def made_up(cost: Cost | None, seeds: int = 3) -> Comparison:
    variants = ("none", "slow", "fast", "same")
    results = tuple(
        RunResult(v, seed, 10, "", {"val/flow": 0.4 + 0.01 * seed, "time/step": 1.0 + seed}, {})
        for v in variants
        for seed in range(seeds)
    )
    return make_comparison(results, cost=cost)


def made_up_cost() -> Cost:
    ratios = {
        "none": Ratio(1.0),
        "slow": Ratio(1.031, 1.022, 1.044, 0.01),
        "fast": Ratio(0.9, 0.88, 0.91, 0.01),
        "same": Ratio(1.006, 1.002, 1.009, 0.01),
    }
    flops = {"none": 10**9, "slow": 1_123_400_000, "fast": 10**9, "same": 10**9}
    return Cost(10, 4, 0, "cpu", 0.01, {
        v: VariantCost(0.2 * ratio.value, ratio, flops[v], None, 100) for v, ratio in ratios.items()
    })  # fmt: skip


def test_the_verdict_tells_the_interleaved_cost(tmp_path: Path) -> None:
    found = made_up(made_up_cost())
    said = verdict(found, summary_rows(found))
    assert ": 3.1% [1.2%, 5.4%] slower" in said.variants["slow"]
    assert ": 10.0% [8.0%, 13.0%] faster" in said.variants["fast"]
    assert re.search(
        r"no detectable change in .*step time \(\+0\.6% \[\N{MINUS SIGN}0\.8%, 1\.9%\]\)",
        said.variants["same"],
    )
    assert "slower" not in said.variants["same"]
    assert "Step times are not over seeds" in said.reading
    rows = {(r.variant, r.metric): r for r in summary_rows(found)}
    assert rows["slow", "cost/gflop"].diff_text == "+12.34%"
    assert rows["slow", "cost/step"].change == "worse" and rows["same", "cost/step"].change == ""
    write_report(found, tmp_path)
    console = Console(width=300, file=io.StringIO())
    print_summary(found, console)
    assert isinstance(console.file, io.StringIO)
    for text in (
        (tmp_path / "report.html").read_text(),
        (tmp_path / "report.md").read_text(),
        console.file.getvalue(),
    ):
        assert "+3.1%" in text and "took turns in one process" in text and "+12.34%" in text
        assert "one after another" not in text
    tex = (tmp_path / "table.tex").read_text()
    assert r"+3.1\%" in tex and not re.search(r"\\%\]?\$\^\{\*\}", tex), "p-values are of seeds"
    (line,) = (
        line
        for line in read_table(tmp_path / "table.csv")
        if (line["metric"], line["variant"]) == ("cost/step", "slow")
    )
    ratio = [float(line[column]) for column in ("ratio", "ratio_low", "ratio_high")]
    assert ratio == pytest.approx([1.031, 1.012, 1.054]), "wider by what equal models differ"


def test_without_it_the_report_says_what_the_times_are(tmp_path: Path) -> None:
    found = made_up(None)
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Step times are of runs made one after another" in text
    assert "GFLOP" not in text


def test_it_survives_the_json(tmp_path: Path) -> None:
    found = made_up(made_up_cost())
    found.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == found


def test_the_interval_holds_the_median() -> None:
    assert doctest.testmod(cost_module).failed == 0
    assert median_interval([float(i) for i in range(10)]) == (1.0, 8.0)
    with pytest.raises(ValueError, match="it takes 6"):
        median_interval([1.0] * 5)
    assert median_interval([2.0, 1.0, 2.0, 2.0, 3.0, 2.0, 2.0]) == (1.0, 3.0)
    assert median_interval([2.0] * 9) == (2.0, 2.0)
    draws = torch.rand(1000, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [median_interval(row) for row in draws.tolist()]
    share = sum(low <= 0.5 <= high for low, high in ends) / len(ends)
    assert 0.95 <= share < 0.98
