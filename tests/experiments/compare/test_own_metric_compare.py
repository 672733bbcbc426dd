"""Comparisons and sweeps by a metric of another package: shown, judged, and of one version."""

import csv
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from alignlab.errors import UserError
from alignlab.experiments.analysis.comparison import load_comparison
from alignlab.experiments.analysis.plots import plot_forest
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.compare.merge import merged
from alignlab.experiments.compare.own_metrics import OwnMetric, as_inputs, own_metrics_of
from alignlab.experiments.compare.result import Comparison, Curve, RunResult
from alignlab.experiments.compare.run import compare
from alignlab.experiments.report.charts import step_charts
from alignlab.experiments.report.cost_charts import cost_charts
from alignlab.experiments.report.forest import forest_charts, forest_figure
from alignlab.experiments.report.latex import table_tex
from alignlab.experiments.report.summary import summary_rows
from alignlab.experiments.report.text import markdown
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.metrics import check_metrics, directions
from alignlab.experiments.sweep.study import sweep_folder
from alignlab.experiments.sweep.trial import refuse_other_inputs
from alignlab.runs.input_record import InputRecord
from alignlab.runs.run_folder import RunFolder
from command_line import alignlab
from made_comparisons import make_comparison
from made_packages import metric_package
from recipe_comparisons import run_of
from small_recipes import comparison_recipe, sweep_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

ENTRIES = {"sharp": "tiny_metric:SHARP"}
VARIANTS = """
cost: null
baseline: none
seeds: [0, 1]
variants:
  none: {}
  aligned: {objectives.ra: {name: refalign, teacher: dino, blocks: [0]}}
"""
ASKED = ["eval.generated_clips=1", "eval.sample_steps=1", "eval.metrics=[sharp]"]


def load(recipe: Path, output: Path, *overrides: str) -> CompareConfig:
    return load_compare(recipe, [f"output={output}", *ASKED, *overrides])


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.yaml"
    return comparison_recipe(recipe_file, path, VARIANTS)


@pytest.fixture(scope="module")
def folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison, measured with version 1.0; not to be changed."""
    output = tmp_path_factory.mktemp("output")
    with metric_package(output / "installed", **ENTRIES):
        return compare(load(recipe, output)).parent


@pytest.fixture
def newer(tmp_path: Path) -> Iterator[None]:
    """Version 1.1 is installed."""
    with metric_package(tmp_path / "newer", version="1.1", **ENTRIES):
        yield


def test_it_joins_tables_statistics_and_report(folder: Path) -> None:
    found = Comparison.load(folder / "comparison.json")
    own = found.own_metrics["sharp"]
    assert (own.package, own.version, own.label) == ("tiny-metrics", "1.0", "sharpness")
    assert found.environment["metric_packages"] == "tiny-metrics 1.0"
    assert all("gen/sharp" in run.metrics for run in found.results)
    with (folder / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "gen/sharp"]
    assert [row["variant"] for row in rows] == ["none", "aligned"]
    text = (folder / "report.md").read_text()
    assert "| sharpness (grey levels) ↑ |" in text
    verdict = (folder / "report.html").read_text()
    assert "sharpness" in verdict


def measured_with(sharp: OwnMetric | None) -> Comparison:
    """Five seeds, in all of which refalign raises gen/sharp; None: nothing says what that is."""

    def run(variant: str, seed: int) -> RunResult:
        value = 5.0 + seed / 10 + (variant == "refalign") * (1 + seed / 100)
        found = run_of(variant, seed)
        measured: dict[str, Curve] = {"gen/sharp": ((1, value / 2), (2, value))}
        return dataclasses.replace(
            found, metrics=found.metrics | {"gen/sharp": value}, measured=measured
        )

    runs = [run(variant, seed) for seed in range(5) for variant in ("none", "refalign")]
    return make_comparison(runs, own_metrics={"sharp": sharp} if sharp else {})


@pytest.mark.parametrize(("better", "change"), [("higher", "better"), ("lower", "worse")])
def test_a_difference_is_claimed_by_its_better_side(
    better: Literal["higher", "lower"], change: str
) -> None:
    rows = summary_rows(measured_with(OwnMetric("a", "1.0", "sharpness", better, headline=True)))
    (row,) = [one for one in rows if (one.variant, one.metric) == ("refalign", "gen/sharp")]
    assert row.change == change and row.headline and row.quantity.label == "sharpness"


def test_charts_of_differences_say_the_unit() -> None:
    found = measured_with(OwnMetric("a", "1.0", "blur", "lower", headline=True, unit="px"))
    rows = summary_rows(found)
    title = "blur (px) \N{DOWNWARDS ARROW}"
    assert title in {chart.title for chart in forest_charts(found, rows)}
    assert title in {chart.title for chart in cost_charts(found, rows)}
    whole = forest_figure(found, rows)
    assert whole is not None
    assert any(one.get_title(loc="left").startswith("blur (px)") for one in whole.axes)
    (axes,) = plot_forest(found, rows, metrics=["gen/sharp"])
    assert axes.get_title() == title


@pytest.mark.usefixtures("newer")
def test_what_a_metric_means_is_said_by_its_own_comparison(tmp_path: Path, recipe: Path) -> None:
    """Neither by a comparison that is loaded later, nor by what is installed."""
    meanings = {
        "one": OwnMetric("a", "1.0", "blur", "lower", headline=True, unit="px"),
        "other": OwnMetric("b", "2.0", "edges", "higher"),
        "unknown": None,
    }
    loaded = {}
    for name, own in meanings.items():
        path = tmp_path / name / "comparison.json"
        path.parent.mkdir()
        measured_with(own).save(path)
        loaded[name] = load_comparison(path)
    load(recipe, tmp_path)
    one, other, unknown = loaded.values()
    assert any("raises blur" in line and "(worse)" in line for line in one.verdict())
    named = ((one, "blur", " (px)"), (other, "edges", ""), (unknown, "gen/sharp", ""))
    for data, label, unit in named:
        assert {row.quantity.label for row in data.rows if row.metric == "gen/sharp"} == {label}
        titles = {chart.title for chart in step_charts(data.comparison)}
        assert {"blur (px)", "blur", "edges", "gen/sharp"} & titles == {label + unit}
        assert len({row.metric for row in data.rows if row.headline} & {"gen/sharp"}) == (
            data is one
        )
    assert "| blur (px) ↓ |" in markdown(one.comparison, list(one.rows))
    assert "blur (px)" in table_tex(one.comparison, list(one.rows))


def test_a_report_needs_no_package(folder: Path, tmp_path: Path) -> None:
    done = alignlab("report", folder, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert "sharpness (grey levels) ↑" in (tmp_path / "again" / "report.md").read_text()
    assert (tmp_path / "again" / "table.csv").read_text() == (folder / "table.csv").read_text()


def test_runs_of_another_version_are_refused_before_any_is_trained(
    recipe: Path, folder: Path, newer: None
) -> None:
    output = folder.parent
    compare(load(recipe, output))  # all are finished, and of one version
    with pytest.raises(UserError) as error:
        compare(load(recipe, output, "seeds=[0,1,2]"))
    assert re.match(
        r".*seed-0 and what is installed: gen/sharp is measured by tiny-metrics 1\.0 and by "
        r"tiny-metrics 1\.1: install one version for all",
        str(error.value),
    )
    assert not list(folder.glob("*/seed-2/metrics.jsonl"))


def test_comparisons_of_two_versions_are_not_merged(folder: Path) -> None:
    found = Comparison.load(folder / "comparison.json")
    newer = json.loads((folder / "comparison.json").read_text())
    newer["own_metrics"]["sharp"]["version"] = "1.1"
    path = folder.parent / "newer.json"
    path.write_text(json.dumps(newer))
    both = [(folder, found), (folder, Comparison.load(path))]
    told = "gen/sharp is measured by tiny-metrics 1.0 and by tiny-metrics 1.1: not merged"
    with pytest.raises(UserError, match=re.escape(told)):
        merged(both, None)
    assert merged([both[0], both[0]], None).own_metrics == found.own_metrics


def test_a_file_from_elsewhere_changes_no_metric_of_ours(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "comparison.json").read_text())
    own = content["own_metrics"].pop("sharp")
    content["own_metrics"] = {"copy_paste_proxy": own}
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(content))
    ours = Comparison.load(path).quantity("gen/copy_paste_proxy")
    assert ours.better == "lower" and ours.label != own["label"]


def test_a_sweep_may_search_for_it(recipe_file: Path, folder: Path, tmp_path: Path) -> None:
    text = "space: {optim.lr: {kind: float, low: 1e-4, high: 1e-2, log: true}}\ntrials: 2\n"
    path = sweep_recipe(recipe_file, tmp_path / "sweep.yaml", text + "metric: gen/sharp\n")
    run = RunFolder.open(next(folder.glob("none/seed-0")))
    with metric_package(tmp_path / "installed", **ENTRIES):
        config = load_sweep(path, [f"output={tmp_path}", *ASKED])
        check_metrics(config)
        assert directions(config) == ["maximize"]
        with pytest.raises(UserError, match=r"gen/sharp is measured with eval.metrics: \[sharp\]"):
            check_metrics(load_sweep(path, [f"output={tmp_path}", *ASKED[:2]]))
        sweep_folder(config).mkdir(parents=True)
        record = InputRecord(sweep_folder(config), config.output)
        record.keep(as_inputs(own_metrics_of(run) or {}), fixed=False)
        refuse_other_inputs(config, config.base)
    with metric_package(tmp_path / "newer", version="1.1", **ENTRIES):
        told = r"eval.metrics.sharp changed since this sweep began \(tiny-metrics 1.0 is gone"
        with pytest.raises(UserError, match=told):
            refuse_other_inputs(config, config.base)
