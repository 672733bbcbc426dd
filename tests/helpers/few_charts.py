"""Reports of tests draw few charts: all of them take half of the time of a small comparison."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from alignlab.experiments.charts import chart
from alignlab.experiments.charts.chart import Chart, save_pdf
from alignlab.experiments.report import write

Sections = Mapping[str, Sequence[Chart]]


@pytest.fixture(scope="module", autouse=True)
def few_charts(request: pytest.FixtureRequest) -> Iterator[None]:
    """The first chart of a section stands for the others, the first page of a PDF for the rest.

    Tests of reports have them all. So have others with a fixture of this name that does nothing.
    """
    if request.path.parent.name == "report":
        yield
        return
    all_sections = write._sections

    def first_charts(*args: Any) -> Sections:
        return {section: charts[:1] for section, charts in all_sections(*args).items()}

    def first_page(figures: Sequence[Figure], path: Path) -> None:
        with pytest.MonkeyPatch.context() as fonts:
            # a font of outlines alone, which need not be searched for what the letters use
            fonts.setitem(chart.RC, "pdf.fonttype", 3)
            save_pdf(figures[:1], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_sections", first_charts)
        patch.setattr(write, "save_pdf", first_page)
        yield
