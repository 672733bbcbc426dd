"""One chart: as a file, inside a page, what it says at a place, and where names stand."""

import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from alignlab.experiments.charts.chart import Chart, inline_svg, placed_readouts, save_pdf
from alignlab.experiments.charts.lines import Line, line_figure, short_names, spread
from alignlab.experiments.charts.look import COLOURS, styles

NAMES = ("none", "a $10^{x}$ <b>&", "c")


def chart_of(names: Sequence[str] = NAMES, count: int = 3) -> Chart:
    known = styles(names, "none")
    x = [10.0 * place for place in range(count)]
    lines = [
        Line(style, x, [v + place for v in x], [v for v in x], [v + 2 * place for v in x])
        for place, style in enumerate(known.values())
    ]
    numbers = {name: place for place, name in enumerate(names)}
    figure, readouts = line_figure(lines, numbers, "step", markers=True, zero=True)
    return Chart("loss", "lower is better", figure, readouts)


def test_a_chart_is_the_same_file_twice() -> None:
    assert chart_of().svg == chart_of().svg


def test_text_of_a_chart_is_text_and_shown_as_it_is() -> None:
    root = ET.fromstring(chart_of().svg)
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert short_names(NAMES)[1] in texts and "step" in texts


def test_a_chart_in_a_page_shares_no_id_and_no_colour_with_another() -> None:
    svg = chart_of().svg
    one, two = (inline_svg(svg, name) for name in ("curves-0", "curves-1"))
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', one))
    assert used and used <= ids[0], "what a chart refers to is in it"
    assert "<style" not in one, "its style would be the whole page's"
    assert not set(re.findall("#[0-9a-f]{6}", one)) & set(COLOURS)
    for place in range(len(NAMES)):
        assert f'class="of-{place}"' in one


def test_a_name_that_looks_like_a_part_of_the_file_is_shown_as_it_is() -> None:
    name = 'a#3f77f3 id="'
    text = inline_svg(chart_of(("none", name)).svg, "curves-0")
    assert ">a#3f77f3 id=&quot;<" in text or f">{name}<" in text


def test_a_readout_lies_where_its_point_is_drawn() -> None:
    chart = chart_of(("none", "a"))
    svg = chart.svg
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    marks = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*fill: #3f77f3', svg)
    marks = marks[1:]  # the first is the band
    places = placed_readouts(chart)
    assert len(places) == len(marks) == 3
    for place, (x, _) in zip(places, marks, strict=True):
        assert isinstance(place, list) and isinstance(place[0], float)
        assert place[0] * width == pytest.approx(float(x), abs=0.1)
        assert place[1] is None
    assert places[1] == [places[1][0], None, "step 10", [[0, "10"], [1, "11 (10 to 12)"]]]  # type: ignore[index]
    assert height == 230.0


def test_all_charts_are_pages_of_one_pdf(tmp_path: Path) -> None:
    figures: list[Figure] = [chart_of().figure, chart_of(("none",)).figure]
    path = tmp_path / "charts.pdf"
    save_pdf(figures, path)
    content = path.read_bytes()
    assert content.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", content)) == 2
    assert b"/Type3" not in content, "journals refuse such fonts"
    save_pdf([chart_of().figure], path)
    assert len(re.findall(rb"/Type /Page\b", path.read_bytes())) == 1


@given(st.lists(st.floats(-2, 3), min_size=1, max_size=16), st.floats(0.01, 0.2))
def test_names_at_the_end_of_lines_never_overlap(places: list[float], gap: float) -> None:
    moved = spread(places, gap)
    ordered = sorted(moved)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(ordered))
    order = sorted(range(len(places)), key=lambda i: places[i])
    assert [moved[i] for i in order] == ordered, "in the order of their lines"
    apart = sorted(places)
    if all(b - a >= gap for a, b in pairwise(apart)):
        assert moved == pytest.approx(places), "nothing moves that has room"


@pytest.mark.parametrize("count", [1, 17, 30])
def test_a_chart_of_any_number_of_variants_is_drawn(count: int) -> None:
    assert "<svg" in chart_of([f"variant {place}" for place in range(count)], count=40).svg


def test_letters_that_no_font_has_stay_text_and_are_told_of_in_a_pdf(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chart = chart_of(("none", "\N{HANGUL LETTER PIEUP-SIOS-TIKEUT}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "\N{HANGUL LETTER PIEUP-SIOS-TIKEUT}" in chart.svg
        save_pdf([chart.figure], tmp_path / "charts.pdf")
        assert "letters that its font lacks are boxes" in caplog.text
        caplog.clear()
        save_pdf([chart_of().figure], tmp_path / "charts.pdf")
    assert not caplog.text


def test_long_names_are_told_apart() -> None:
    names = [
        "layersync-detach-block-3",
        "layersync-whole-block-3",
        "none",
        "layersync-whole-block-3",
    ]
    shown = short_names(names)
    assert shown == ["lay…detach-bloc…", "lay…whole-block…", "none", "lay…whole-block…"]


@given(st.lists(st.text("ab-", max_size=60), unique=True, max_size=12))
def test_no_two_names_are_shown_alike(names: list[str]) -> None:
    shown = short_names(names)
    assert len(set(shown)) == len(names)
    assert all(len(text) <= 16 for text in shown)
