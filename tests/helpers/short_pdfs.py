"""Reports of tests draw two pages of charts.pdf: all take a sixth of a small comparison's time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from alignlab.experiments.charts.chart import save_pdf
from alignlab.experiments.report import write

PAGES = 2


@pytest.fixture(scope="module", autouse=True)
def short_pdfs() -> Iterator[None]:
    """The first pages stand for the others, whose figures are drawn for the page anyway.

    Tests of the file itself have a fixture of this name that does nothing.
    """

    def first_pages(figures: Sequence[Figure], path: Path) -> None:
        save_pdf(figures[:PAGES], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "save_pdf", first_pages)
        yield
