"""A comparison as frames, sentences and a plot: the numbers of its files, in types that fit."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from alignlab.errors import UserError
from alignlab.experiments import load_comparison
from alignlab.experiments.analysis.comparison import ComparisonData
from alignlab.experiments.charts.look import PAPER
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.rebuild import Choice, rebuild
from alignlab.experiments.compare.run import compare
from alignlab.experiments.report.verdict import verdict
from drawn_charts import points
from made_comparisons import make_comparison
from recipe_comparisons import recipe_comparison, run_of, written
from run_contents import table_frame, timeless
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

VARIANTS = """
cost: {rounds: 6}
baseline: none
seeds: [0, 1, 2]
variants:
  none: {}
  aligned:
    objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2]}
"""
KEYS = ["variant", "seed", "metric", "step"]


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    comparison_recipe(recipe_file, path, VARIANTS)
    path.write_text(path.read_text().replace("eval: {", "eval: {every: 1, "))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> ComparisonData:
    """Two variants over three seeds, two steps each."""
    output = tmp_path_factory.mktemp("comparisons")
    return load_comparison(compare(load_compare(recipe, [f"output={output}"])).parent)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ComparisonData:
    found = recipe_comparison(("none", "refalign", "repa"), (0, 1, 2, 3))
    return load_comparison(written(found, tmp_path_factory.mktemp("made") / "four"))


@pytest.fixture
def _agg() -> Iterator[None]:
    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def drawn(ax: Axes) -> None:
    """Sees that the figure can be drawn."""
    ax.figure.canvas.draw()


def test_the_frame_has_each_final_number_of_the_table(trained: ComparisonData) -> None:
    frame, table = trained.to_frame(), table_frame(trained.folder / "table.csv")
    final = frame[frame["final"]]
    assert (final["step"] == 2).all()
    wide = final.pivot(index=["metric", "variant"], columns="seed", values="value")
    own = table[table["metric"].isin(final["metric"])].set_index(["metric", "variant"])
    assert len(wide) == len(own) > 20
    for seed in trained.seeds:
        assert wide[seed].eq(own[f"seed_{seed}"].reindex(wide.index)).all()


def test_the_frame_has_every_point_of_curves_once(trained: ComparisonData) -> None:
    frame, steps = trained.to_frame(), table_frame(trained.folder / "steps.csv")
    assert not frame.duplicated(KEYS).any()
    both = steps.merge(frame, on=KEYS, suffixes=("", "_frame"), how="left")
    assert len(both) == len(steps) > 0 and (both["value"] == both["value_frame"]).all()
    flow = frame[(frame["metric"] == "val/flow") & (frame["variant"] == "none")]
    assert sorted(flow[flow["seed"] == 1]["step"]) == [1, 2]
    assert sorted(flow[flow["final"]]["step"]) == [2, 2, 2]
    log = frame[frame["metric"] == "loss/flow"]
    assert len(log) == 12 and not log["final"].any()
    (curve,) = (
        r.curves["loss/flow"]
        for r in trained.comparison.results
        if r.variant == "none" and r.seed == 2
    )
    own = log[(log["variant"] == "none") & (log["seed"] == 2)].sort_values("step")
    assert tuple(zip(own["step"], own["value"], strict=True)) == curve


def test_parts_of_names_are_columns(made: ComparisonData) -> None:
    frame = made.to_frame().drop_duplicates("metric").set_index("metric")
    assert list(frame.columns) == [
        *("variant", "seed", "quantity", "block", "noise_bin", "step", "value", "final")
    ]
    parts = frame[["quantity", "block", "noise_bin"]]
    assert parts.loc["cross_cos/block1"].tolist()[:2] == ["cross_cos", 1]
    assert parts.loc["val/flow/t7"]["noise_bin"] == 7
    assert parts.loc["val/flow/t7"]["quantity"] == "val/flow"
    assert parts.loc["cross_cos/mean"]["quantity"] == "cross_cos"
    assert parts.loc[["cross_cos/mean", "val/flow"]][["block", "noise_bin"]].isna().all(axis=None)
    types = made.to_frame().dtypes.astype(str).to_dict()
    assert types["seed"] == types["step"] == "int64" and types["block"] == "Int64"
    assert (types["value"], types["final"]) == ("float64", "bool")


@pytest.mark.parametrize("which", ["trained", "made"])
def test_the_table_is_table_csv(which: str, request: pytest.FixtureRequest) -> None:
    data: ComparisonData = request.getfixturevalue(which)
    table, expected = data.table(), table_frame(data.folder / "table.csv")
    columns = list(expected.columns)
    assert list(table.columns) == [*columns, "quantity", "block", "noise_bin", "claimed"]
    for name in columns:
        mine, theirs = table[name], expected[name]
        if name in ("metric", "better", "variant", "diff_scale", "method", "change"):
            assert mine.tolist() == theirs.fillna("").tolist(), name
        elif name != "never_reached_seeds":
            assert mine.isna().tolist() == theirs.isna().tolist(), name
            assert mine.dropna().tolist() == theirs.dropna().tolist(), name


def test_differences_are_those_that_are_claimed(made: ComparisonData) -> None:
    differences = made.differences()
    assert set(differences["variant"]) == {"refalign", "repa"}
    flow = differences[differences["metric"] == "val/flow"].set_index("variant")
    assert flow["change"].to_dict() == {"refalign": "better", "repa": "worse"}
    assert flow["claimed"].all()
    outside = (differences["diff_low"] > 0) | (differences["diff_high"] < 0)
    assert (outside == differences["claimed"])[differences["diff_low"].notna()].all()


def test_the_verdict_is_the_reports(made: ComparisonData) -> None:
    assert made.verdict() == verdict(made.comparison, made.rows).sentences
    assert made.verdict()[0] in (made.folder / "report.md").read_text()


def test_seeds_needed_as_a_frame(made: ComparisonData) -> None:
    needed = made.seeds_needed(0.002).set_index("variant")
    table = made.differences()
    own = table[table["metric"] == "val/flow"].set_index("variant")
    assert needed["detectable"].to_dict() == own["detectable"].to_dict()


@pytest.mark.usefixtures("_agg")
def test_the_forest_shows_intervals_claims_and_what_was_not_seen(made: ComparisonData) -> None:
    axes = made.plot_forest()
    drawn(axes[0])
    titles = [ax.get_title() for ax in axes]
    assert len(axes) == 3 and titles[0].startswith("validation flow loss")
    flow = made.differences()
    flow = flow[flow["metric"] == "val/flow"].set_index("variant")
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["refalign", "repa"]
    across = [(x, y) for x, y in map(points, axes[0].lines) if len(x) == 2 and y[0] == y[1]]
    for place, (line, variant) in enumerate(zip(across, ["refalign", "repa"], strict=True)):
        row = flow.loc[variant]
        assert line == ([row["diff_low"], row["diff_high"]], [place, place])
        shade = axes[0].collections[place].get_paths()[0].get_extents()
        assert (shade.x0, shade.x1) == pytest.approx((-row["detectable"], row["detectable"]))


@pytest.mark.usefixtures("_agg")
def test_a_forest_of_many_metrics_has_several_rows(made: ComparisonData) -> None:
    names = [f"cross_cos/block{block}" for block in (0, 1)]
    axes = made.plot_forest(metrics=["val/flow", "val/flow/t0", "val/flow/t7", *names])
    places = [ax.get_subplotspec() for ax in axes]
    assert [(p.rowspan.start, p.colspan.start) for p in places if p is not None] == [
        *((0, 0), (0, 1), (0, 2)),
        *((1, 0), (1, 1)),
    ]
    assert len(axes[0].figure.axes) == 5, "no empty plot is left"


def test_only_what_is_claimed_is_filled_in_the_forest(made: ComparisonData) -> None:
    table = made.differences().set_index(["metric", "variant"])
    for metric in ("val/flow", "cross_cos/mean", "val/flow/t0"):
        (ax,) = made.plot_forest(metrics=[metric])
        means = [line for line in ax.lines if line.get_marker() in ("o", "s")]
        for point, variant in zip(means, ("refalign", "repa"), strict=True):
            is_filled = point.get_markerfacecolor() != PAPER
            assert is_filled == table.loc[(metric, variant)]["claimed"]
            assert points(point)[0] == [table.loc[(metric, variant)]["diff_mean"]]


@pytest.mark.usefixtures("_agg")
def test_the_forest_is_drawn_into_given_axes(made: ComparisonData) -> None:
    _, (one, two) = plt.subplots(1, 2)
    assert made.plot_forest(one, ["val/flow"]) == [one]
    assert made.plot_forest([one, two], ["val/flow", "steps_to_target"]) == [one, two]
    assert "in %" in two.get_xlabel()
    with pytest.raises(UserError, match="1 axes for 2 metrics"):
        made.plot_forest(one, ["val/flow", "cross_cos/mean"])
    with pytest.raises(UserError, match="unknown metric 'val/flaw', did you mean 'val/flow'"):
        made.plot_forest(metrics=["val/flaw"])


@pytest.mark.usefixtures("_agg")
def test_any_name_of_a_variant_is_drawn() -> None:
    runs = [
        *(run_of("none", seed) for seed in range(3)),
        *(run_of("repa", seed) for seed in range(3)),
    ]
    names = {"none": "none", "repa": r"$\frac{"}
    odd = [dataclasses.replace(run, variant=names[run.variant]) for run in runs]
    data = ComparisonData(make_comparison(odd), Path())
    (ax, *_) = data.plot_forest()
    drawn(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == [r"$\frac{"]


@pytest.mark.usefixtures("_agg")
def test_without_differences_there_is_no_forest() -> None:
    data = ComparisonData(make_comparison([run_of("none", 0)]), Path())
    with pytest.raises(UserError, match="no metric has differences"):
        data.plot_forest()
    assert data.differences().empty and len(data.to_frame()) > 0


def test_no_run_at_all_is_an_empty_frame() -> None:
    empty = make_comparison([], variants=("none",), seeds=(0,))
    data = ComparisonData(empty, Path())
    assert data.to_frame().empty and data.table().empty
    assert "value" in data.to_frame().columns and "diff_mean" in data.table().columns


def test_real_seeds_merged_are_the_comparison_made_at_once(
    trained: ComparisonData, recipe: Path, tmp_path: Path
) -> None:
    parts = []
    for name, seeds in (("one", "[0,2]"), ("two", "[1,2]")):
        options = [f"output={tmp_path}", f"name={name}", f"seeds={seeds}", "cost=null"]
        parts.append(compare(load_compare(recipe, options)).parent)
    found, report = rebuild(parts, tmp_path / "both", Choice(seeds=(0, 1, 2)))
    assert set(found.seeds) == {0, 1, 2} and len(found.results) == 6
    assert found.differing == trained.comparison.differing
    for run in found.results:
        other = trained.comparison.run(run.variant, run.seed)
        assert other is not None
        assert timeless(run.metrics) == timeless(other.metrics)
        assert run.curves == other.curves
        assert (report.parent / run.run_dir / "recipe.yaml").is_file()
    merged = load_comparison(report.parent).differences().set_index(["metric", "variant"])
    whole = trained.differences().set_index(["metric", "variant"])
    both = ["val/flow", "cknna/mean"]
    columns = ["diff_low", "diff_high", "p_value", "change"]
    pd.testing.assert_frame_equal(
        merged.loc[both][columns], whole.loc[both][columns], check_exact=False
    )


def test_what_holds_something_else_is_told(trained: ComparisonData, tmp_path: Path) -> None:
    run = trained.folder / "none" / "seed-0"
    with pytest.raises(UserError, match=r"holds a run: alignlab\.experiments\.load_run reads it"):
        load_comparison(run)
    with pytest.raises(UserError, match="no such folder"):
        load_comparison(tmp_path / "nothing")
    with pytest.raises(UserError, match="no comparison there"):
        load_comparison(tmp_path)
    assert load_comparison(trained.folder / "comparison.json").comparison == trained.comparison


def test_the_room_is_imported_without_its_libraries() -> None:
    code = (
        "import sys, alignlab.experiments as room;"
        "assert {'load_comparison', 'load_run', 'load_sweep'} <= set(dir(room));"
        "assert not hasattr(room, 'load_nothing');"
        "found = {'torch', 'pandas', 'matplotlib', 'optuna'} & set(sys.modules);"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
