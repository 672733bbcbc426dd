"""A page in a real, headless browser: what a script finds in it, and how it prints."""

import json
import re
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DARK = "--blink-settings=preferredColorScheme=0"
FIRST_SCRIPT = '<script type="application/json" id="readouts">'
# What is drawn inside a chart's axes: lines, marks and coloured cells, not ticks and frames.
DRAWN = repr(
    'svg g[id*="-axes_"] > :is([class^="of-"], [id*="-line2d_"], [id*="Collection_"], '
    '[id*="Mesh_"], image, g:has(> image))'
)


def with_script(page: Path, script: str, name: str = "looked.html") -> Path:
    """A copy of the page that ends with a script.

    `found` is what the script leaves to `opened`, or a promise of it.
    """
    show = """
    Promise.resolve(found).then((found) => {
      const result = document.createElement("pre");
      result.id = "found";
      result.textContent = JSON.stringify(found);
      document.body.append(result);
    });
    """
    copy = page.with_name(name)
    text = page.read_text("utf-8")
    copy.write_text(text.replace("</body>", f"<script>{script}{show}</script></body>"), "utf-8")
    return copy


def opened(page: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the page's script found, and the console, where a blocked request shows up too."""
    done = _run(page, "--enable-logging=stderr", *options, "--dump-dom")
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return json.loads(found[1]), console


@dataclass(frozen=True)
class Printed:
    """A page on paper.

    Args:
        pages: how many.
        size: of the first page in points, width and height.
        scale: points per CSS pixel; 0.75 unless something is too wide, which makes all smaller.
    """

    pages: int
    size: tuple[int, int]
    scale: float


def printed(page: Path, *options: str) -> Printed:
    """Prints the page to PDF."""
    pdf = page.with_suffix(".pdf")
    _run(page, *options, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    box = re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert box
    numbers = [_scales(part) for part in _streams(content)]
    outer, inner = next(found for found in numbers if len(found) > 1)[:2]
    return Printed(
        len(re.findall(rb"/Type /Page\b", content)),
        (round(float(box[1])), round(float(box[2]))),
        round(outer * inner, 3),
    )


def _streams(pdf: bytes) -> list[bytes]:
    found = []
    for match in re.finditer(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            found.append(zlib.decompress(match[1]))
        except zlib.error:  # an image or a font that is packed otherwise
            continue
    return found


def _scales(stream: bytes) -> list[float]:
    """Of the transformations in a content stream, outermost first."""
    return [float(x) for x in re.findall(rb"^([\d.]+) [-\d. ]+ cm$", stream, re.MULTILINE)]


def _run(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={page.with_name('profile')}", "--virtual-time-budget=3000",
            *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
