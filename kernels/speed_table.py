"""Which implementation was the fastest on a GPU: what `impl="auto"` goes by there.

The rows are those of `alignlab bench kernels` (`bench/csv_file.py`): the committed ones beside this
file, and those of this machine in a file named by `use_rows`, which take the place of all committed
ones of the same device. A size is an operation, a dtype, N tokens, C channels and M matrices
(samples times blocks); its decision is the implementation whose forward and backward pass took the
least time. Decisions hold for a device by name, and for the torch and Triton that were measured.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

COMMITTED = Path(__file__).with_name("results") / "all_benchmark_data.csv"
IMPLEMENTATIONS = ("chunked", "triton", "eager")
"""That a row may speak for; of equally fast ones, the first is taken."""
REACH = 2.0
"""A measured size speaks for sizes up to so many times larger or smaller, in N and in C."""

_NEEDED = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "torch_version",
    "triton_version",
)

_own: Path | None = None


class Size(NamedTuple):
    """What was measured: an operation (`pull_push`), a dtype (`bfloat16`), N, C and M."""

    operation: str
    dtype: str
    tokens: int
    width: int
    matrices: int


class _Time(NamedTuple):
    """Of a forward and backward pass, in milliseconds: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


class SpeedTable(NamedTuple):
    """The decisions for one device.

    Args:
        decisions: by size; `chunked` wherever no other was faster by more than the noise.
        problem: why there are none where rows exist or a file cannot be used, in one line.
    """

    decisions: Mapping[Size, str]
    problem: str | None = None

    def nearest(self, size: Size) -> Size | None:
        """The measured size that speaks for `size`, or None.

        It is the nearest in N and C, by ratio, of those within `REACH` in both; then the nearest in
        M. Of two equally near ones the larger.
        """
        alike = [one for one in self.decisions if one[:2] == size[:2]]
        near = [
            one
            for one in alike
            if max(_apart(one.tokens, size.tokens), _apart(one.width, size.width))
            <= round(math.log2(REACH), 9)
        ]

        def order(one: Size) -> tuple[float, ...]:
            distance = _apart(one.tokens, size.tokens) + _apart(one.width, size.width)
            larger = (-one.tokens, -one.width)
            return distance, *larger, _apart(one.matrices, size.matrices), -one.matrices

        return min(near, key=order, default=None)

    def digest(self) -> str:
        """Of all decisions: tables that decide alike have the same."""
        lines = sorted("\t".join(map(str, (*size, name))) for size, name in self.decisions.items())
        return sha256("\n".join(lines).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        """Such as `chunked`, or `9f86d081884c (pull_push bfloat16: chunked, triton)`."""
        if not self.decisions:
            return "chunked"
        names: dict[str, set[str]] = {}
        for size, name in self.decisions.items():
            names.setdefault(f"{size.operation} {size.dtype}", set()).add(name)
        shown = (f"{kind}: {', '.join(sorted(chosen))}" for kind, chosen in sorted(names.items()))
        return f"{self.digest()} ({'; '.join(shown)})"


def use_rows(path: Path | None) -> None:
    """Names the file with this machine's own rows, which need not exist; None: there is none."""
    global _own
    if path != _own:
        _own = path
        table_of.cache_clear()


@cache
def table_of(device: str) -> SpeedTable:
    """The decisions for a device, read once in a process."""
    problems = []
    for path in (_own, COMMITTED):
        if path is None or not path.is_file():
            continue
        try:
            rows = [row for row in read(path) if row["gpu_name"] == device]
            fitting = [row for row in rows if _is_of_this_software(row)]
            decisions = decide(fitting)
        except ValueError as error:
            problems.append(f"{path} cannot be used: {error}")
            continue
        if decisions:
            return SpeedTable(decisions, "; ".join(problems) or None)
        if rows and not fitting:
            measured = ", ".join(sorted({_software(row) for row in rows}))
            problems.append(f"{path} has rows of {measured}, and this is {_this_software()}")
    return SpeedTable({}, "; ".join(problems) or None)


def read(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a file.

    Raises:
        ValueError: it cannot be read, or is no table of `alignlab bench kernels`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"it has no column {missing[0]}")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(str(error)) from error
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has too many or too few columns")
    return rows


def decide(rows: Iterable[Mapping[str, str]]) -> dict[Size, str]:
    """Decides for each size at which `chunked` was measured.

    Another implementation is taken where its 80th percentile is below the 20th of `chunked`: a
    difference within the noise changes no bits of a run. Of several the one with the least median.

    Args:
        rows: of one device; where a thing was measured again, the newest counts.

    Raises:
        ValueError: a row does not hold what its columns say.
    """
    times: dict[Size, dict[str, _Time]] = {}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        kind = (row["metric_name"], row["kernel_operation_mode"])
        if kind == ("speed", "full") and row["kernel_provider"] in IMPLEMENTATIONS:
            times.setdefault(_size(row), {})[row["kernel_provider"]] = _time(row)
    decisions = {}
    for size, by_name in times.items():
        if "chunked" not in by_name:
            continue
        usual = by_name["chunked"]
        faster = [name for name in IMPLEMENTATIONS if name in by_name]
        faster = [name for name in faster if by_name[name].p80 < usual.p20]
        decisions[size] = min(faster, key=lambda name: by_name[name].median, default="chunked")
    return decisions


def _size(row: Mapping[str, str]) -> Size:
    try:
        config = json.loads(row["extra_benchmark_config_str"])
        numbers = (int(row["x_value"]), int(config["width"]), int(config["blocks"]))
        size = Size(row["kernel_name"], str(config["dtype"]), *numbers)
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"no size: {row['extra_benchmark_config_str']!r}") from None
    if min(size.tokens, size.width, size.matrices) < 1:
        raise ValueError(f"no size: {row['extra_benchmark_config_str']!r}")
    return size


def _time(row: Mapping[str, str]) -> _Time:
    values = [row[f"y_value_{quantile}"] for quantile in (50, 20, 80)]
    try:
        time = _Time(*map(float, values))
    except ValueError:
        raise ValueError(f"no time: {values}") from None
    if not all(0 < value < math.inf for value in time):
        raise ValueError(f"no time: {values}")
    return time


def _apart(one: int, other: int) -> float:
    """Rounded, so that a ratio and its inverse are equally far."""
    return round(abs(math.log2(one / other)), 9)


def _is_of_this_software(row: Mapping[str, str]) -> bool:
    return _software(row) == _this_software()


def _software(row: Mapping[str, str]) -> str:
    return f"torch {_minor(row['torch_version'])}, Triton {_minor(row['triton_version'])}"


@cache
def _this_software() -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return f"torch {_minor(torch.__version__)}, Triton {_minor(triton)}"


def _minor(full: str) -> str:
    """`2.13` of `2.13.0+cpu`: what decides which code is compiled."""
    return ".".join(full.split(".")[:2])
