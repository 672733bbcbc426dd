"""The tables of metrics and docs/metrics.md say the same."""

import re
from pathlib import Path

import pytest

from alignlab.evaluation.metric_registry import (
    GENERATION_METRICS,
    METRICS,
    NAMED_SUBJECT_METRICS,
    REFERENCE_METRICS,
    VIDEO_METRICS,
    Metric,
)

DOCS = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text()
DOCUMENTED = GENERATION_METRICS | NAMED_SUBJECT_METRICS | REFERENCE_METRICS | VIDEO_METRICS


def documented_rows() -> dict[str, dict[str, str]]:
    """Cells by column of every docs table that has a better side, by metric."""
    rows: dict[str, dict[str, str]] = {}
    for table in re.findall(r"(?m)^\| name \|.*\n(?:\|.*\n)+", DOCS):
        head, _, *lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
        ]
        rows |= {cells[0].strip("`"): dict(zip(head, cells, strict=True)) for cells in lines}
    return rows


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_metric_is_documented_as_its_row_says(name: str) -> None:
    metric, documented = DOCUMENTED[name], documented_rows()[name]
    assert documented["better"] == ("neither" if metric.better == "none" else metric.better)
    assert documented.get("unit", metric.unit) == metric.unit
    assert name in NAMED_SUBJECT_METRICS or f"**`{name}`**" in DOCS, "has a paragraph"


def test_the_docs_have_no_other_metric() -> None:
    assert documented_rows().keys() == DOCUMENTED.keys()


def test_named_subjects_are_no_metrics_of_a_run() -> None:
    assert not any(name.removeprefix("gen/") in NAMED_SUBJECT_METRICS for name in METRICS)
    assert all(isinstance(metric, Metric) and metric.label for metric in METRICS.values())
