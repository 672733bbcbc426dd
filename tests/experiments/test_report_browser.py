"""The report in a real browser: no error, nothing fetched, charts drawn, tables sorted."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from alignlab.experiments.report import write_report
from alignlab.experiments.result import Comparison, RunResult

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium or google-chrome is installed")

# Runs after the page's own script; what it finds is read back from the dumped page.
PROBE = """
<script>
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
const report = {
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
const result = document.createElement("pre");
result.id = "probe";
result.textContent = JSON.stringify(report);
document.body.append(result);
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three variants over three seeds, and the probe."""
    folder = tmp_path_factory.mktemp("browser")
    flow = {"none": 0.40, "slow": 0.45, "fast": 0.35}
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
    comparison = Comparison(
        "a demo", "none", (0, 1, 2), tuple(flow), "steps: 10\n",
        {f"optim.{name}": {"none": 1, "slow": 2} for name in ("lr", "warmup")},
        {}, 1.0, "alignlab compare", "", results,
    )  # fmt: skip
    path = write_report(comparison, folder)
    probed = folder / "probed.html"
    probed.write_text(path.read_text("utf-8").replace("</body>", PROBE + "</body>"), "utf-8")
    return probed


def opened(page: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the probe found, and the console, where a blocked request shows up too."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={page.with_name('profile')}", "--enable-logging=stderr",
            "--virtual-time-budget=3000", *options, "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return json.loads(found[1]), console


def test_the_page_works(page: Path) -> None:
    found, console = opened(page, "--window-size=1400,1000")
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


def test_the_page_is_dark_and_narrow_where_asked(page: Path) -> None:
    found, console = opened(
        page, "--blink-settings=preferredColorScheme=0", "--window-size=500,900"
    )
    assert console == ""
    assert found["background"] == "rgb(20, 23, 28)" and found["ink"] == "#e4e7eb"
    assert not found["overflow"], "wide tables scroll inside their boxes"
