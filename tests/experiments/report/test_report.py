"""The written report: complete, self-contained, escaped, and alive when things are missing."""

import base64
import csv
import dataclasses
import doctest
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from alignlab.config.run import RunConfig
from alignlab.experiments.compare.config import differing_settings
from alignlab.experiments.compare.result import Comparison, Curve, RunResult, SampleClip
from alignlab.experiments.report import latex
from alignlab.experiments.report.charts import block_charts, curve_charts
from alignlab.experiments.report.summary import joined, summary_rows
from alignlab.experiments.report.text import print_summary, setting_table
from alignlab.experiments.report.write import write_report
from drawn_charts import drawn_bands, drawn_lines, points
from made_comparisons import make_comparison

NASTY = "</script><script>alert(1)</script><img src=http://evil.example/x.png>"
SEEDS = (0, 1)


def write_clip(path: Path, level: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def run_result(folder: Path, variant: str, index: int, seed: int) -> RunResult:
    run_dir = f"run-{index}/seed-{seed}"
    samples = folder / run_dir / "samples"
    samples.mkdir(parents=True)
    write_clip(samples / "0.mp4", 20 * index + seed)
    write_clip(samples / "0-real.mp4", 200)
    Image.new("RGB", (16, 16), (index, seed, 9)).save(samples / "0-reference-0.png")
    clip = SampleClip(
        "val-0",
        f"a caption {NASTY}",
        "samples/0.mp4",
        "samples/0-real.mp4",
        ("samples/0-reference-0.png",),
    )
    metrics = {"val/flow": 0.4 - 0.01234 * index + 0.05678 * seed, "params/extra": 1000.0 * index}
    metrics |= {f"val/flow/t{b}": 0.1 * b + 0.01 * index for b in range(10)}
    metrics |= {f"silhouette/block{b}": 0.1 * b + 0.02 * index + 0.003 * seed for b in (0, 2)}
    metrics |= {"silhouette/mean": 0.1111 + 0.02 * index + 0.003 * seed, "time/step": 0.3}
    steps = range(1, 251)
    curves = {"loss/flow": tuple((step, 1 / step + 0.01 * index) for step in steps)}
    if index:
        curves["loss/ra/pull"] = tuple((step, 2 / step) for step in steps)
    return RunResult(variant, seed, 250, run_dir, metrics, curves, (clip,))


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    variants = ("none", "ra", NASTY)
    return make_comparison(
        (
            run_result(tmp_path, variant, index, seed)
            for index, variant in enumerate(variants)
            for seed in SEEDS
        ),
        name="a demo",
        recipe=f"name: a demo\nnote: {NASTY}\n",
        differing={"objectives.ra.blocks": {"ra": [0, 1], NASTY: None}, "x": {"none": NASTY}},
        environment={"torch": "2.13.0", "threads": 2},
        duration_s=75.0,
        command="alignlab compare demo",
        commit="0123abc",
    )


class Page(HTMLParser):
    """Everything in a page that could load something, and its text outside scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = ("src", "href", "poster", "data", "srcset", "action", "xlink:href")
        self.loads += [value or "" for name, value in attrs if name in loading]
        if tag in ("script", "style"):
            self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def readouts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def page_of(comparison: Comparison, folder: Path) -> Page:
    return Page(write_report(comparison, folder).read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_outside(comparison: Comparison, tmp_path: Path) -> None:
    page = page_of(comparison, tmp_path)
    assert page.loads, "clips and references are in the page"
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    assert "url(" not in "".join(page.styles)
    assert "@import" not in "".join(page.styles)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html


def test_charts_are_inside_and_beside_the_page(comparison: Comparison, tmp_path: Path) -> None:
    page = page_of(comparison, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg ") > len(page.readouts["charts"]) >= 6
    assert len(html) < 2_000_000
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert {"charts.pdf", "forest.pdf", "forest.svg"} <= set(names)
    assert len(names) == 3 + len(page.readouts["charts"])
    assert names[0].startswith("01-forest-validation-flow-loss")
    pages = re.findall(rb"/Type /Page\b", (tmp_path / "figures" / "charts.pdf").read_bytes())
    assert len(pages) == len(names) - 3
    few = dataclasses.replace(comparison, results=comparison.results[:1])
    own = [tmp_path / "figures" / name for name in ("teaser.pdf", "01-mine.svg", ".hidden.pdf")]
    for path in own:
        path.write_text("mine")
    write_report(few, tmp_path)
    assert all(path.is_file() for path in own), "what somebody else put there stays"
    left = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert "forest.svg" not in left, "what an earlier report drew is gone"


def test_clips_are_inside_bit_by_bit(comparison: Comparison, tmp_path: Path) -> None:
    loads = page_of(comparison, tmp_path).loads
    videos = [base64.b64decode(s.split(",")[1]) for s in loads if s.startswith("data:video/mp4")]
    wanted = [tmp_path / run.run_dir / run.samples[0].video for run in comparison.results]
    assert [v for v in videos if v == wanted[0].read_bytes()], "seed 0 of the first variant"
    assert len(videos) == 1 + len(comparison.variants), "the real clip and one per variant"
    with av.open(io.BytesIO(videos[0])) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    images = [s for s in loads if s.startswith("data:image/png")]
    assert len(images) == 1


def test_captions_and_names_cannot_break_out(comparison: Comparison, tmp_path: Path) -> None:
    page = page_of(comparison, tmp_path)
    assert len(page.scripts) == 2
    assert not any(script.startswith("alert") for script in page.scripts)
    assert f"a caption {NASTY}" in page.text, "shown as text"
    assert f"note: {NASTY}" in page.text
    assert page.readouts["names"] == ["none", "ra", NASTY]
    assert "<" not in page.scripts[0]


def test_every_form_shows_the_same_numbers(comparison: Comparison, tmp_path: Path) -> None:
    page = page_of(comparison, tmp_path)
    console = Console(width=300, file=io.StringIO())
    print_summary(comparison, console)
    assert isinstance(console.file, io.StringIO)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    texts = (page.text, markdown, console.file.getvalue())
    rows = [row for row in summary_rows(comparison) if row.headline]
    assert len(rows) == 4 * 3
    for row in rows:
        for text in texts:
            assert joined(row.text) in text
            assert row.diff_text in text
            assert row.quantity.label in text
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text("utf-8"))))
    assert len(lines) == len(summary_rows(comparison))
    by_key = {(line["metric"], line["variant"]): line for line in lines}
    for row in rows:
        line = by_key[row.metric, row.variant]
        assert float(line["mean"]) == row.mean
        assert float(line["seed_1"]) == row.values[1]
        for column, field in (("diff_mean", "mean"), ("diff_low", "low"), ("holm_p", "holm_p")):
            number = getattr(row.paired, field, None)
            assert line[column] == ("" if number is None else str(number))


def test_everything_asked_for_is_there(comparison: Comparison, tmp_path: Path) -> None:
    text = page_of(comparison, tmp_path).text
    assert "objectives.ra.blocks — [0, 1] —" in text
    for wanted in (
        "a demo",
        "objectives.ra.blocks",
        "[0, 1]",
        "0123abc",
        "alignlab compare demo",
        "1 min 15 s",
        "2.13.0",
        "All 6 runs took 250 steps.",
        "silhouette/block2",
        "validation flow loss by timestep",
        "loss/flow, minus baseline",
        "loss/ra/pull",
    ):
        assert wanted in text


def test_charts_hold_means_bands_and_differences(comparison: Comparison) -> None:
    (block,) = block_charts(comparison, summary_rows(comparison))
    (line,) = drawn_lines(block, comparison.variants)["ra"]
    across, up = points(line)
    assert across == [0, 2] and up == pytest.approx([0.0215, 0.2215])
    assert drawn_bands(block, comparison.variants)["ra"] == pytest.approx((0.02, 0.223))
    difference = drawn_lines(curve_charts(comparison)[1], comparison.variants)
    _, values = points(difference["ra"][0])
    assert len(values) <= 100 and values == pytest.approx([0.01] * len(values))
    assert "none" not in difference


def test_missing_pieces_leave_a_dash_and_a_note(comparison: Comparison, tmp_path: Path) -> None:
    first, *others = comparison.results
    sparse = {"val/flow": 0.4, "val/flow/t0": math.nan}
    broken = dataclasses.replace(first, metrics=sparse, curves={"loss/flow": ((1, math.nan),)})
    kept = [broken, *others[:2]]
    (tmp_path / broken.run_dir / "samples/0.mp4").unlink()
    thinned = dataclasses.replace(comparison, results=tuple(kept))
    page = page_of(thinned, tmp_path)
    assert "— no clip" in page.text
    assert "Runs without a result: ra (seed 1)" in page.text
    assert "subject silhouette, block mean (silhouette/mean): none: 1 of 2 seeds" in page.text
    assert "not finite" in page.text
    assert "NaN" not in page.scripts[0]


def test_a_curve_without_a_finite_number_has_no_chart(comparison: Comparison) -> None:
    wild: dict[str, Curve] = {"loss/flow": ((1, math.nan), (2, math.inf))}
    results = tuple(dataclasses.replace(run, curves=wild) for run in comparison.results)
    assert curve_charts(dataclasses.replace(comparison, results=results)) == []


@pytest.mark.parametrize("kept", [0, 1])
def test_almost_empty_comparisons_are_written(
    comparison: Comparison, tmp_path: Path, kept: int
) -> None:
    bare = dataclasses.replace(comparison, results=comparison.results[:kept], differing={})
    page = page_of(bare, tmp_path)
    print_summary(bare, Console(file=io.StringIO()))
    assert "No setting of the resolved recipes differs." in page.text
    assert ("No run has finished." in page.text) == (kept == 0)


def test_unequal_budgets_are_named(comparison: Comparison, tmp_path: Path) -> None:
    first, *others = comparison.results
    short = dataclasses.replace(first, steps=100)
    unequal = dataclasses.replace(comparison, results=(short, *others))
    text = page_of(unequal, tmp_path).text
    assert "did not take the same number of steps: none: 100, 250; ra: 250" in text


def test_one_seed_shows_no_spread(comparison: Comparison, tmp_path: Path) -> None:
    results = tuple(run for run in comparison.results if run.seed == 0)
    page = page_of(dataclasses.replace(comparison, seeds=(0,), results=results), tmp_path)
    assert "±" not in page.text
    assert "One seed (0) only" in page.text
    assert "±" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_latex_table_is_whole(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path)
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    assert doctest.testmod(latex).failed == 0
    inside = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(inside) == 1 + 2 * 2, "the baseline has no second line"
    assert {line.count(" & ") for line in inside} == {4}
    assert all(line.endswith(r" \\") for line in inside)
    assert r"\textbf{" not in text, "two seeds claim nothing"
    assert "$-$0.01234" in inside[2]
    assert r"\textless{}/script\textgreater{}" in inside[3] and "</script" not in text
    assert text.isascii() and not re.search(r"[#<>|]", text)


def test_a_measured_weight_is_one_setting_in_words(make_config: Callable[..., RunConfig]) -> None:
    share = "objectives.ra.weight={gradient_share: 0.1}"
    runs = {
        "none": make_config(aligned=False),
        "number": make_config("objectives.ra.weight=0.3"),
        "share": make_config(share),
        "fewer": make_config(share, "objectives.ra.weight.steps=5"),
    }
    comparison = make_comparison((), variants=tuple(runs), differing=differing_settings(runs))
    rows = setting_table(comparison, comparison.differing)
    weights = {name: row for name, row in rows.items() if name.startswith("objectives.ra.weight")}
    words = "gradient share 0.1"
    assert weights == {
        "objectives.ra.weight": {
            "none": "—",
            "number": "0.3",
            "share": words,
            "fewer": f"{words}, measured in 5 steps",
        }
    }
    del runs["number"], runs["none"]
    assert list(differing_settings(runs)) == ["objectives.ra.weight.steps"]
