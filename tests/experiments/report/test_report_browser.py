"""The report in a real browser: no error, nothing fetched, charts drawn, tables sorted."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pydantic import JsonValue

from alignlab.data.video import encode_mp4
from alignlab.experiments.compare.result import Comparison, RunResult, SampleClip
from alignlab.experiments.report.write import write_report
from browser_tools import DRAWN
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
function reading() {
  const key = (plot, name) => plot.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
  const plot = plots.find((one) => one.dataset.chart.startsWith("timesteps"));
  const tip = document.querySelector(".tip");
  const seen = [];
  for (const name of ["ArrowRight", "ArrowRight", "ArrowLeft", "Escape"]) {
    key(plot, name);
    seen.push(tip.hidden ? "" : [...tip.children].map((line) => line.textContent).join("|"));
  }
  const box = plot.getBoundingClientRect();
  const at = { clientX: box.right - 1, clientY: box.top + 20, bubbles: true };
  plot.dispatchEvent(new PointerEvent("pointermove", at));
  return [...seen, tip.textContent.slice(0, 12)];
}
document.querySelector(".legend button").click();
const shown = (of) =>
  [...document.querySelectorAll(of)].filter((part) => part.style.display !== "none").length;
const words = (row) => row.innerText.split(/\\s+/);
const found = {
  orders,
  sorted: table.querySelectorAll('th[aria-sort$="ending"]').length,
  plots: plots.length,
  empty: plots.filter((plot) => !plot.querySelector(DRAWN)).map((plot) => plot.dataset.chart),
  hidden: shown(".of-0"),
  left: shown(".of-1"),
  fetched: performance.getEntriesByType("resource").map((entry) => entry.name),
  background: getComputedStyle(document.documentElement).backgroundColor,
  ink: getComputedStyle(plots[0].querySelector("text")).fill,
  told: reading(),
  matrix: [...document.querySelectorAll(".matrix tbody tr")].map(words),
  overflow: document.documentElement.scrollWidth > document.documentElement.clientWidth,
};
""".replace("DRAWN", DRAWN)


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
    assert found["empty"] == [] and found["plots"] >= 6
    assert found["hidden"] == 0 < found["left"], "the legend hides the baseline in every chart"
    first, second = (
        f"timestep t {t}|slow: {s}|fast: {f}"
        for t, s, f in (("0.05000", "0.4500", "0.3500"), ("0.1500", "0.5500", "0.4500"))
    )
    assert found["told"] == [first, second, first, "", "timestep t 0"], "by keys, by the pointer"
    assert [row[0] for row in found["matrix"]] == ["slow", "fast"]
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
    assert found["background"] == "rgb(20, 23, 28)" and found["ink"] == "rgb(228, 231, 235)"
    assert not found["overflow"], "wide tables scroll inside their boxes"


# Printing is announced and over, as a browser says it.
PRINT = """
const state = () => ({
  open: [...document.querySelectorAll("details")].map((details) => details.open),
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
    assert found["before"]["open"].count(False) == 3
    assert found["during"]["open"].count(False) == 1, "statistics of all metrics fill many pages"


PLAY = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const times = () => clips().map((video) => Math.round(video.currentTime * 100) / 100);
const found = (async () => {
  await wait(400);
  const label = play.textContent;
  scrub.value = 0.5;
  scrub.dispatchEvent(new Event("input"));
  await wait(400);
  const scrubbed = [play.textContent, ...new Set(times())];
  document.querySelector(".minus").click();
  await wait(400);
  const over = [...document.querySelectorAll("video.over")];
  const shown = over.map((video) => video.parentElement.firstChild.dataset.variant);
  const same = over.every((video) => video.src === document.querySelector("[data-base]").src);
  play.click();
  const playing = play.textContent;
  document.querySelector(".minus").click();
  play.click();
  const left = document.querySelectorAll("video.over").length;
  return { label, scrubbed, shown, same, playing, left, clips: clips().length, end: seconds() };
})();
"""


def test_clips_play_together_are_scrubbed_and_compared(browser: ModuleType, tmp_path: Path) -> None:
    made = comparison({"none": 0.40, "slow": 0.45, "fast": 0.35})
    frames = torch.linspace(0, 255, 8 * 64 * 64 * 3).reshape(8, 64, 64, 3).to(torch.uint8)
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(frames, 8.0))
    clip = SampleClip("val-0", "a red circle", "clip.mp4", "clip.mp4")
    results = tuple(dataclasses.replace(run, samples=(clip,)) for run in made.results)
    page = write_report(dataclasses.replace(made, results=results), tmp_path)
    found, console = browser.opened(browser.with_script(page, PLAY), "--window-size=1400,1000")
    assert console == ""
    assert found["label"] == "Pause" and found["clips"] == 4 and found["end"] == 1.0
    assert found["scrubbed"] == ["Play", 0.5], "all clips at one place, and none runs on"
    assert found["shown"] == ["slow", "fast"] and found["same"], "the baseline's over the others"
    assert found["playing"] == "Pause" and found["left"] == 0


def test_many_variants_fit_a_page_of_paper(browser: ModuleType, tmp_path: Path) -> None:
    made = comparison({"none": 0.4} | {f"variant-{i}": 0.4 + 0.01 * i for i in range(9)})
    clip = SampleClip("val-0", "a red circle moves up, over a plain gray background", "gone.mp4")
    results = tuple(dataclasses.replace(run, samples=(clip,)) for run in made.results)
    long: dict[str, JsonValue] = {
        "none": "a/very/long/folder/name/without/any/space",
        "variant-8": [0, 1, 2, 3, 4, 5],
    }
    wide = dataclasses.replace(made, results=results, differing={"objectives.ra.path": long})
    page = write_report(wide, tmp_path)
    narrow, _ = browser.opened(browser.with_script(page, PROBE), "--window-size=500,900")
    assert not narrow["overflow"], "nothing but its tables is wider than a narrow window"
    found = browser.printed(page)
    assert (found.size, found.scale) == ((842, 595), 0.75), "A4 landscape, and nothing shrunk"
    assert found.pages <= 9
