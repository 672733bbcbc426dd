"""The probe's page in a real browser: no error, nothing fetched, charts drawn, tables beside."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from alignlab.experiments.probe_page import probe
from alignlab.recipe import load_run
from alignlab.train import train

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium or google-chrome is installed")

# Runs after the page's own script; what it finds is read back from the dumped page.
LOOK = """
<script>
const drawn = (plot) => plot.querySelector(".scatterlayer path, .heatmaplayer image, .hm image");
const result = document.createElement("pre");
result.id = "look";
result.textContent = JSON.stringify({
  plots: plots.length,
  empty: plots.filter((plot) => !drawn(plot)).map((plot) => plot.dataset.figure),
  unnamed: plots.filter((plot) => !plot.ariaLabel).length,
  tables: document.querySelectorAll("table.full").length,
  fetched: performance.getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => !name.startsWith("data:")),
  background: getComputedStyle(document.documentElement).backgroundColor,
  ink: plots[0].layout.font.color,
  overflow: document.documentElement.scrollWidth > document.documentElement.clientWidth,
});
document.body.append(result);
</script>
"""


@pytest.fixture(scope="module")
def page(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of two steps, and the look."""
    folder = tmp_path_factory.mktemp("browser")
    settings = [f"output={folder}", "data.references=[3,3]", "eval.sample_clips=1"]
    path = probe(train(load_run(recipe_file, settings)), folder / "probe")
    looked = folder / "looked.html"
    looked.write_text(path.read_text("utf-8").replace("</body>", LOOK + "</body>"), "utf-8")
    return looked


def opened(page: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the look found, and the console, where a blocked request shows up too."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={page.with_name('profile')}", "--enable-logging=stderr",
            "--virtual-time-budget=3000", *options, "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="look">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return json.loads(found[1]), console


def test_every_chart_is_drawn_and_has_numbers_beside_it(page: Path) -> None:
    found, console = opened(page, "--window-size=1400,1000")
    assert (console, found["fetched"], found["empty"], found["unnamed"]) == ("", [], [], 0)
    assert found["plots"] == 5 * 3 + 3 + 3
    assert found["tables"] == 5 + 1 + 1 + 1
    assert found["background"] == "rgb(255, 255, 255)" and not found["overflow"]


def test_the_page_is_dark_and_narrow_where_asked(page: Path) -> None:
    found, console = opened(
        page, "--blink-settings=preferredColorScheme=0", "--window-size=500,900"
    )
    assert console == ""
    assert found["background"] == "rgb(20, 23, 28)" and found["ink"] == "#e4e7eb"
    assert not found["overflow"], "wide tables scroll inside their boxes"
