"""Metrics of runs that were evaluated while they trained: charts, the Markdown table, steps.csv."""

import dataclasses
import math
from pathlib import Path

import pytest

from alignlab.experiments.charts.chart import Chart
from alignlab.experiments.charts.look import BASELINE_COLOUR
from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.compare.run import collect
from alignlab.experiments.report.charts import step_charts
from alignlab.experiments.report.write import write_report
from alignlab.runs.metric_rows import append_row
from alignlab.runs.run_folder import RunFolder
from drawn_charts import drawn_bands, drawn_lines, points
from made_comparisons import make_comparison
from run_contents import read_table

STEPS = (4, 8, 12)


def run_of(variant: str, seed: int, level: float) -> RunResult:
    flows = tuple((step, level / step + 0.01 * seed) for step in STEPS)
    measured = {
        "val/flow": flows,
        "val/flow/t3": flows,
        "silhouette/block0": ((4, 0.1), (12, 0.2)),
        "silhouette/mean": ((4, 0.1), (12, 0.2 + level)),
        "gen/identity_proxy": ((12, 0.5),),
        "gen_real/identity_proxy": ((12, 0.9),),
    }
    metrics = {name: curve[-1][1] for name, curve in measured.items()}
    return RunResult(variant, seed, 12, "", metrics, {}, measured=measured)


@pytest.fixture
def comparison() -> Comparison:
    levels = {"none": 1.0, "fast": 0.5}
    return make_comparison(run_of(v, seed, level) for v, level in levels.items() for seed in (0, 1))


def lines(chart: Chart) -> dict[str, tuple[list[float], list[float], str]]:
    """Line of every variant: places, values, colour; all have markers."""
    found = {}
    for variant, (line,) in drawn_lines(chart, ("none", "fast")).items():
        assert line.get_marker() not in ("", "None") and line.get_markevery() in (1, None)
        found[variant] = (*points(line), str(line.get_color()))
    return found


def test_every_whole_metric_is_drawn_against_the_step(comparison: Comparison) -> None:
    charts = {chart.title: chart for chart in step_charts(comparison)}
    assert list(charts) == [
        "validation flow loss",
        "validation flow loss, minus baseline",
        "subject silhouette, block mean",
        "subject identity (proxy)",
    ]
    flow = charts["validation flow loss"]
    assert flow.caption == "lower is better; dotted: the baseline's last, the target"
    drawn = lines(flow)
    places, values, colour = drawn["none"]
    assert places == list(STEPS) and colour == BASELINE_COLOUR
    assert values == pytest.approx([1 / step + 0.005 for step in STEPS])
    assert drawn_bands(flow, ("none", "fast"))["none"][1] == pytest.approx(1 / 4 + 0.01)
    paired = lines(charts["validation flow loss, minus baseline"])
    assert list(paired) == ["fast"]
    assert paired["fast"][1] == pytest.approx([-0.5 / step for step in STEPS])
    assert lines(charts["subject silhouette, block mean"])["fast"][0] == [4, 12]


def test_the_report_holds_the_steps_in_every_form(comparison: Comparison, tmp_path: Path) -> None:
    text = write_report(comparison, tmp_path).read_text()
    assert text.count('data-chart="steps-') == 4
    markdown = (tmp_path / "report.md").read_text()
    assert "| metric | variant | 4 | 8 | 12 |" in markdown
    assert "| subject silhouette, block mean | fast | 0.1000 ± 0 | — | 0.7000 ± 0 |" in markdown
    rows = read_table(tmp_path / "steps.csv")
    assert len(rows) == 4 * (3 + 3 + 2 + 2 + 1 + 1)
    one = next(row for row in rows if row["metric"] == "val/flow/t3")
    assert one == {
        "metric": "val/flow/t3",
        "variant": "none",
        "seed": "0",
        "step": "4",
        "value": "0.25",
    }
    path = tmp_path / "comparison.json"
    comparison.save(path)
    assert Comparison.load(path) == comparison


def test_without_evaluations_there_is_nothing_of_them(
    comparison: Comparison, tmp_path: Path
) -> None:
    write_report(comparison, tmp_path)
    plain = tuple(dataclasses.replace(run, measured={}) for run in comparison.results)
    text = write_report(dataclasses.replace(comparison, results=plain), tmp_path).read_text()
    assert "Metrics during training" not in text + (tmp_path / "report.md").read_text()
    assert not (tmp_path / "steps.csv").exists()


def test_many_steps_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    steps = range(10, 1010, 10)
    flows = {
        variant: tuple((step, math.nan if step == 1000 else level / step) for step in steps)
        for variant, level in {"none": 1.0, "fast": 0.5}.items()
    }
    made = make_comparison(
        RunResult(v, 0, 1000, "", {"val/flow": c[-1][1]}, {}, measured={"val/flow": c})
        for v, c in flows.items()
    )
    write_report(made, tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    header = next(line for line in markdown.split("\n") if line.startswith("| metric | variant"))
    assert header.split("|")[3:-1] == [
        f" {step:,} " for step in (120, 250, 380, 500, 620, 750, 880, 1000)
    ]
    assert "not finite |" in markdown


def test_a_mean_over_blocks_is_of_the_same_blocks_at_every_step(tmp_path: Path) -> None:
    def found(*blocks: int) -> dict[str, float]:
        values = {f"silhouette/block{block}": float(block) for block in blocks}
        return {"val/flow": 1.0, **values, "silhouette/mean": sum(blocks) / len(blocks)}

    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for step, blocks in ((4, (0,)), (8, (0, 2, 7))):
        append_row(run.metrics, {"step": step, "time": 1.0, **found(*blocks)})
    run.write_result({"steps": 12, "metrics": found(0, 2, 7)})
    assert collect(run, "none", 0, tmp_path, (0, 2)).measured == {
        "val/flow": ((4, 1.0), (8, 1.0), (12, 1.0)),
        "silhouette/block0": ((4, 0.0), (8, 0.0), (12, 0.0)),
        "silhouette/block2": ((8, 2.0), (12, 2.0)),
        "silhouette/mean": ((8, 1.0), (12, 1.0)),
    }
