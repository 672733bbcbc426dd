"""The probe's page in a real browser: no error, nothing fetched, charts drawn, tables beside."""

from pathlib import Path
from types import ModuleType

import pytest

from alignlab.experiments.probe.page import probe
from alignlab.recipe import load_run
from alignlab.train import train
from browser_tools import DRAWN

# Runs after the page's own script; what it finds is read back from the dumped page.
LOOK = """
const found = {
  plots: plots.length,
  empty: plots.filter((plot) => !plot.querySelector(DRAWN)).map((plot) => plot.dataset.chart),
  unnamed: plots.filter((plot) => !plot.ariaLabel).length,
  tables: document.querySelectorAll("table.full").length,
  fetched: performance.getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => !name.startsWith("data:")),
  background: getComputedStyle(document.documentElement).backgroundColor,
  ink: getComputedStyle(plots[0].querySelector("text")).fill,
  light: plots[0].innerHTML.includes("fill: #fefefe"),
  overflow: document.documentElement.scrollWidth > document.documentElement.clientWidth,
};
""".replace("DRAWN", DRAWN)


@pytest.fixture(scope="module")
def page(browser: ModuleType, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of two steps, and the look."""
    folder = tmp_path_factory.mktemp("browser")
    settings = [f"output={folder}", "data.references=[3,3]", "eval.sample_clips=1"]
    path = probe(train(load_run(recipe_file, settings)), folder / "probe")
    looked: Path = browser.with_script(path, LOOK)
    return looked


def test_every_chart_is_drawn_and_has_numbers_beside_it(browser: ModuleType, page: Path) -> None:
    found, console = browser.opened(page, "--window-size=1400,1000")
    assert (console, found["fetched"], found["empty"], found["unnamed"]) == ("", [], [], 0)
    assert found["plots"] == 5 * 3 + 3 + 3
    assert found["tables"] == 5 + 1 + 1 + 1
    assert found["background"] == "rgb(255, 255, 255)" and not found["overflow"]


def test_the_page_is_dark_and_narrow_where_asked(browser: ModuleType, page: Path) -> None:
    found, console = browser.opened(page, browser.DARK, "--window-size=500,900")
    assert console == ""
    assert found["background"] == "rgb(20, 23, 28)" and found["ink"] == "rgb(228, 231, 235)"
    assert not found["overflow"], "wide tables scroll inside their boxes"
    assert found["light"], "numbers on dark cells stay light on a dark page"


def test_the_page_prints_unshrunk(browser: ModuleType, page: Path) -> None:
    assert browser.printed(page).scale == 0.75
