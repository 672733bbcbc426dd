"""Measurements as rows of a table with Liger-Kernel's columns, so that its tools read them.

Behind its columns come the versions and the commit. `gpu_name` is the device, whichever it is.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from alignlab.kernels.bench.run import UNITS, Measurement

Row = dict[str, str]

_KEY = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
)
_VALUES = ("y_value_50", "y_value_20", "y_value_80")
_FACTS = ("timestamp", "alignlab_version", "torch_version", "triton_version", "commit")
COLUMNS = (*_KEY, *_VALUES, "extra_benchmark_config_str", "gpu_name", *_FACTS)


def to_row(measurement: Measurement, facts: Mapping[str, str]) -> Row:
    """Turns a measurement into a row.

    `extra_benchmark_config_str` has the FLOPs that a roofline share is computed from: those of
    the minimum, or what `floor` did.

    Args:
        measurement: what to write.
        facts: `gpu_name`, `timestamp`, the versions and `commit`.
    """
    case = measurement.case
    config = {
        "size": case.size,
        "width": case.width,
        "blocks": case.blocks,
        "dtype": case.dtype_name,
        "flops": measurement.flops,
    }
    return {
        "kernel_name": case.op,
        "kernel_provider": measurement.provider,
        "kernel_operation_mode": measurement.mode,
        "metric_name": measurement.metric,
        "metric_unit": UNITS[measurement.metric],
        "x_name": "N",
        "x_label": "tokens per sample",
        "x_value": str(case.num_tokens),
        **{key: f"{value:.6g}" for key, value in zip(_VALUES, measurement.spread, strict=True)},
        "extra_benchmark_config_str": json.dumps(config),
        **facts,
    }


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def replace_rows(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Joins rows; a new one takes the place of an old one of the same thing on the same device, of
    the same commit, alignlab, torch and Triton."""
    kept = {_identity(row): row for row in [*old, *new]}
    return list(kept.values())


def to_csv(rows: Iterable[Row]) -> str:
    """Writes rows as text, with the header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _identity(row: Row) -> tuple[str, ...]:
    facts = (fact for fact in _FACTS if fact != "timestamp")
    return tuple(row[key] for key in (*_KEY, "extra_benchmark_config_str", "gpu_name", *facts))
