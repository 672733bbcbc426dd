"""How variants were tuned, in the report of a comparison that nobody trained."""

from pathlib import Path

import pytest
from rich.console import Console

from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.summary import summary_rows
from alignlab.experiments.report.text import markdown, print_summary
from alignlab.experiments.report.tuning_charts import tuning_charts
from recipe_comparisons import recipe_comparison, written

LR = "optim.lr"
TUNING = {
    "tuning.trials": {"none": 3, "refalign": 3},
    "tuning.metric": {"none": ["val/flow"], "refalign": ["val/flow"]},
    "tuning.space": {"none": {LR: "0.0002 to 0.005 (log)"}, "refalign": {LR: "0.0002 to 0.005"}},
    "tuning.best": {"none": {LR: 0.005}, "refalign": {LR: 0.001}},
    "tuning.border": {"none": {LR: "upper"}, "refalign": {}},
    "tuning.history": {"none": [[0, 0.5], [1, 0.7], [2, 0.3]], "refalign": [[0, 0.4], [2, 0.45]]},
    "tuning.direction": {"none": "minimize", "refalign": "minimize"},
}
WARNING = (
    "the best optim.lr of its sweep, 0.005000, is at the upper end of what was searched "
    "(0.0002 to 0.005 (log)): a better one may lie beyond"
)


@pytest.fixture(scope="module")
def tuned() -> Comparison:
    return recipe_comparison(tuning=TUNING)


def test_a_best_on_the_border_is_told_in_page_text_and_terminal(
    tuned: Comparison, tmp_path: Path
) -> None:
    folder = written(tuned, tmp_path / "tuned")
    page = (folder / "report.html").read_text()
    assert f"<b>none</b>, {WARNING}" in page and "1 warning of 1 variant<" in page
    assert '<span class="chip worse">the upper end</span>' in page
    text = markdown(tuned, summary_rows(tuned))
    assert f"- variant none, {WARNING}" in text
    console = Console(record=True, width=300)
    print_summary(tuned, console)
    assert f"Warning: variant none, {WARNING}" in console.export_text()


def test_the_text_has_spaces_bests_and_how_they_came(tuned: Comparison) -> None:
    text = markdown(tuned, summary_rows(tuned))
    assert "| none | optim.lr | 0.0002 to 0.005 (log) | 0.005000 | the upper end |" in text
    assert "| refalign | optim.lr | 0.0002 to 0.005 | 0.001000 | — |" in text
    assert "- none: 0.5000 (trial 0), 0.3000 (trial 2)" in text
    assert "- refalign: 0.4000 (trial 0)\n" in text
    assert "| tuning.trials | 3 | 3 |" in text and "tuning.history" not in text


def test_the_chart_has_the_best_so_far_of_each(tuned: Comparison) -> None:
    (chart,) = tuning_charts(tuned)
    assert chart.title == f"Tuning: {tuned.quantity('val/flow').label}"
    rows = {(one.heading, text) for one in chart.readouts for _, text in one.rows}
    assert any("0.3000" in text for heading, text in rows if "2" in heading), rows
    assert not any("0.7" in text for _, text in rows), "the best, not the last"


def test_facts_of_an_older_comparison_make_no_table(tuned: Comparison) -> None:
    older = recipe_comparison(tuning={"tuning.trials": {"none": None, "refalign": 40}})
    text = markdown(older, summary_rows(older))
    assert "| tuning.trials | — | 40 |" in text and "| searched |" not in text
    assert tuning_charts(older) == []
