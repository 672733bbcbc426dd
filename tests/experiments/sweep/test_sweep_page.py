"""The page of a sweep: in a browser, on paper, and with what its runs gave warning of."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.page import write_page
from alignlab.experiments.sweep.results import best_trial
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import SweepStudy, join_study
from browser_tools import DRAWN

SWEEP = """
checkpoint: {every: 2}
space:
  objectives.ra.weight: {kind: float, low: 0.1, high: 10.0, log: true}
  objectives.ra.neg_weight: {kind: float, low: 0.1, high: 10.0, log: true}
  objectives.ra.blocks: {kind: blocks, choose: single, last: 3}
sampler: {name: random, seed: 0}
metric: val/flow
trials: 4
seeds: [0]
steps: 1
"""
LOOK = """
const found = {
  plots: plots.length,
  empty: plots.filter((plot) => !plot.querySelector(DRAWN)).map((plot) => plot.ariaLabel),
  fetched: performance.getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => !name.startsWith("data:")),
  background: getComputedStyle(document.documentElement).backgroundColor,
  ink: getComputedStyle(plots[0].querySelector("text")).fill,
  overflow: document.documentElement.scrollWidth > document.documentElement.clientWidth,
};
""".replace("DRAWN", DRAWN)


@pytest.fixture(scope="module", autouse=True)
def few_charts() -> None:
    """Here a page has all its charts."""


@pytest.fixture(scope="module")
def study(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepStudy:
    folder = tmp_path_factory.mktemp("sweep")
    recipe = folder / "sweep.yaml"
    lines = [line for line in recipe_file.read_text().split("\n") if not line.startswith("steps")]
    recipe.write_text("\n".join(lines).replace("name: run", "name: sweep") + SWEEP)
    config = load_sweep(recipe, [f"output={folder}"])
    sweep(config)
    return join_study(config)


def written(study: SweepStudy, notes: dict[int, list[str]] | None = None) -> Path:
    """The page after these trials' runs gave these warnings."""
    page = Path(study.config.output) / "sweep"
    for trial in range(4):
        result = page / f"trial-{trial:04d}" / "seed-0" / "result.json"
        content = json.loads(result.read_text()) | {"notes": (notes or {}).get(trial, [])}
        content.pop("checksum", None)
        result.write_text(json.dumps(content))
    return write_page(study, best_trial(study))


def test_trials_that_gave_warnings_are_named(study: SweepStudy) -> None:
    text = written(study, {1: ["block 0 <may> collapse [3 of 8]"], 3: ["odd"]}).read_text()
    assert "<summary>2 trials gave warnings</summary>" in text
    assert "<li>trial 1: block 0 &lt;may&gt; collapse (3 of 8)</li>" in text
    assert "<li>trial 3: odd</li>" in text
    assert "gave warnings" not in written(study).read_text()


def test_a_trial_whose_folder_is_elsewhere_is_left_out(study: SweepStudy) -> None:
    page = written(study, {2: ["odd"]})
    result = page.with_name("trial-0002") / "seed-0" / "result.json"
    content = result.read_text()
    result.unlink()
    assert "gave warnings" not in write_page(study, best_trial(study)).read_text()
    result.write_text(content)


def test_the_page_works_in_a_browser(browser: ModuleType, study: SweepStudy) -> None:
    page = browser.with_script(written(study), LOOK)
    found, console = browser.opened(page, "--window-size=1400,1000")
    assert (console, found["fetched"], found["empty"]) == ("", [], [])
    # history, importance, slice, parallel, pairs and the blocks
    assert found["plots"] == 6 and not found["overflow"]
    dark, console = browser.opened(page, browser.DARK, "--window-size=500,900")
    assert (console, dark["overflow"]) == ("", False), "wide charts scroll inside their boxes"
    assert dark["background"] == "rgb(20, 23, 28)" and dark["ink"] == "rgb(228, 231, 235)"
    assert found["background"] == "rgb(255, 255, 255)" and found["ink"] == "rgb(31, 41, 55)"


def test_the_charts_of_a_sweep_print_unshrunk(browser: ModuleType, study: SweepStudy) -> None:
    found = browser.printed(written(study))
    assert found.scale == 0.75 and found.pages <= 4
