"""Pages of tests have few charts: all of them take half of the time of a small comparison."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from alignlab.experiments.charts.chart import Chart, save_pdf
from alignlab.experiments.charts.look import RC
from alignlab.experiments.probe import page as probe_page
from alignlab.experiments.report import write
from alignlab.experiments.report.page import render
from alignlab.experiments.sweep import page as sweep_page

Sections = Mapping[str, Sequence[Chart]]
# Folders of the tests of pages.
ALL = ("report", "probe")


@pytest.fixture(scope="module", autouse=True)
def few_charts(request: pytest.FixtureRequest) -> Iterator[None]:
    """The first chart of a section stands for the others, the first page of a PDF for the rest.

    Tests of pages have them all. So have others with a fixture of this name that does nothing.
    """
    if request.path.parent.name in ALL:
        yield
        return
    all_sections = write._sections

    def first_of_each(sections: Sections) -> Sections:
        return {section: charts[:1] for section, charts in sections.items()}

    def first_charts(*args: Any) -> Sections:
        return first_of_each(all_sections(*args))

    def short_page(template: str, sections: Sections, *args: Any, **values: Any) -> str:
        return render(template, first_of_each(sections), *args, **values)

    def first_page(figures: Sequence[Figure], path: Path) -> None:
        with pytest.MonkeyPatch.context() as fonts:
            # a font of outlines alone, which need not be searched for what the letters use
            fonts.setitem(RC, "pdf.fonttype", 3)
            save_pdf(figures[:1], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_sections", first_charts)
        patch.setattr(write, "save_pdf", first_page)
        for page in (probe_page, sweep_page):
            patch.setattr(page, "render", short_page)
        yield
