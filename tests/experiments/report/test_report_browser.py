"""The report in a real browser: no error, nothing fetched, charts drawn, tables sorted."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import JsonValue

from alignlab.experiments.compare.result import Comparison, RunResult, SampleClip
from alignlab.experiments.report.write import write_report
from made_comparisons import make_comparison

# Runs after the page's own script; what it finds is read back from the dumped page.
PROBE = """
const name = (row) => row.cells[0].textContent.trim().split(/\\s+/)[0];
const seen = (table) => [...table.tBodies[0].rows].map(name);
const table = document.querySelector("table.summary");
const buttons = [...table.querySelectorAll("th button")];
const orders = [seen(table)];
for (const button of [buttons[1], buttons[1], buttons[0]]) {
  button.focus();
  button.click();
  orders.push([document.activeElement === button, button.closest("th").ariaSort, ...seen(table)]);
}
document.querySelector(".legend button").click();
const found = {
  orders,
  sorted: table.querySelectorAll('th[aria-sort$="ending"]').length,
  plots: plots.length,
  drawn: plots.filter((plot) => plot.querySelector(".main-svg .scatterlayer path")).length,
  hidden: plots.flatMap((plot) => plot.data).filter((trace) => trace.visible === false).length,
  fetched: performance.getEntriesByType("resource").map((entry) => entry.name),
  background: getComputedStyle(document.documentElement).backgroundColor,
  ink: plots[0].layout.font.color,
  overflow: document.documentElement.scrollWidth > document.documentElement.clientWidth,
};
"""


def comparison(flow: dict[str, float]) -> Comparison:
    """Variants over three seeds, by validation loss."""
    results = tuple(
        RunResult(
            variant,
            seed,
            10,
            "",
            {
                "val/flow": value + 0.01 * seed,
                **{f"val/flow/t{place}": value + 0.1 * place for place in range(10)},
                **{f"silhouette/block{place}": value + 0.01 * seed for place in range(3)},
                "time/step": 1 + value + 0.001 * seed**2,
            },
            {"loss/flow": tuple((step, value / step) for step in range(1, 40))},
        )
        for variant, value in flow.items()
        for seed in range(3)
    )
    differing = {f"optim.{name}": {"none": 1, "slow": 2} for name in ("lr", "warmup")}
    return make_comparison(results, name="a demo", recipe="steps: 10\n", differing=differing)


@pytest.fixture(scope="module")
def page(browser: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three variants, and the probe."""
    made = comparison({"none": 0.40, "slow": 0.45, "fast": 0.35})
    path = write_report(made, tmp_path_factory.mktemp("browser"))
    probed: Path = browser.with_script(path, PROBE)
    return probed


def test_the_page_works(browser: ModuleType, page: Path) -> None:
    found, console = browser.opened(page, "--window-size=1400,1000")
    assert (console, found["fetched"]) == ("", [])
    assert found["plots"] == found["drawn"] >= 6
    assert found["hidden"] >= found["plots"] - 2, "the legend hides the baseline in every chart"
    assert found["orders"] == [
        ["none", "slow", "fast"],
        [True, "ascending", "fast", "none", "slow"],
        [True, "descending", "slow", "none", "fast"],
        [True, "ascending", "fast", "none", "slow"],
    ]
    assert found["sorted"] == 1
    assert found["background"] == "rgb(255, 255, 255)"


def test_the_page_is_dark_and_narrow_where_asked(browser: ModuleType, page: Path) -> None:
    found, console = browser.opened(page, browser.DARK, "--window-size=500,900")
    assert console == ""
    assert found["background"] == "rgb(20, 23, 28)" and found["ink"] == "#e4e7eb"
    assert not found["overflow"], "wide tables scroll inside their boxes"


# Printing is announced and over, as a browser says it.
PRINT = """
const state = () => ({
  open: [...document.querySelectorAll("details")].map((details) => details.open),
  widths: [...new Set(plots.map((plot) => plot._fullLayout.width))],
});
const before = state();
dispatchEvent(new Event("beforeprint"));
const during = state();
dispatchEvent(new Event("afterprint"));
const found = { before, during, after: state() };
"""


def test_what_is_closed_is_open_on_paper_and_closed_again_after(
    browser: ModuleType, page: Path
) -> None:
    watched = browser.with_script(page.with_name("report.html"), PRINT, "printing.html")
    found, console = browser.opened(watched, "--window-size=1400,1000")
    assert console == ""
    assert found["after"] == found["before"]
    assert found["during"]["widths"] == [300] != found["before"]["widths"]
    assert found["before"]["open"].count(False) == 2
    assert found["during"]["open"].count(False) == 1, "statistics of all metrics fill many pages"


def test_many_variants_fit_a_page_of_paper(browser: ModuleType, tmp_path: Path) -> None:
    made = comparison({"none": 0.4} | {f"variant-{i}": 0.4 + 0.01 * i for i in range(9)})
    clip = SampleClip("val-0", "a red circle moves up, over a plain gray background", "gone.mp4")
    results = tuple(dataclasses.replace(run, samples=(clip,)) for run in made.results)
    long: dict[str, JsonValue] = {
        "none": "a/very/long/folder/name/without/any/space",
        "variant-8": [0, 1, 2, 3, 4, 5],
    }
    wide = dataclasses.replace(made, results=results, differing={"objectives.ra.path": long})
    found = browser.printed(write_report(wide, tmp_path))
    assert (found.size, found.scale) == ((842, 595), 0.75), "A4 landscape, and nothing shrunk"
    assert found.pages <= 9
