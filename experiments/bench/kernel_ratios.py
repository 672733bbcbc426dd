"""The command `alignlab bench compare`: how figures of one `bench kernels` differ from another's.

The rows of two tables are joined by operation, implementation, size, width, blocks, dtype, pass and
quantity. A ratio is the new median over the old one. Its interval goes from the new 20th percentile
over the old 80th to the new 80th over the old 20th: what two steps taken at random mostly lie
within. It is no confidence interval of the medians, and wider than one. Of memory, which does not
vary, interval and ratio are one number.

The same code does not take the same time on another day. What both tables measured of the floor,
the bare matrix products of a case, shows by how much: a limit is held against the ratio of times
divided by that of the floor (`Ratio.judged`).
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignlab.errors import UserError
from alignlab.experiments.report.escaping import csv_cell, one_visible_line
from alignlab.kernels import speed_table
from alignlab.kernels.bench.csv_file import Row
from alignlab.kernels.bench.measure import Spread
from alignlab.runs.atomic_files import write_text

FACTS = ("gpu_name", "commit", "alignlab_version", "torch_version", "triton_version")
PASSES = {"forward": "forward", "full": "forward + backward"}
CSV_NAME = "ratios.csv"
FLOOR = "floor"
OVER_THE_FLOOR = (
    "over the floor's: divided by new / old of the floor in the same case and pass, low by its "
    "high and high by its low; --fail-above judges this where it is known, else new / old"
)


class Figure(NamedTuple):
    """What was measured: the same in both tables."""

    op: str
    impl: str
    size: str
    width: str
    blocks: str
    dtype: str
    mode: str
    metric: str

    @property
    def case(self) -> str:
        """Such as `pull_push 3x1560 C=1024 L=9 float32`."""
        blocks = f" L={self.blocks}" if self.op == "pull_push" else ""
        return f"{self.op} {self.size} C={self.width}{blocks} {self.dtype}"

    @property
    def quantity(self) -> str:
        """Such as `forward, time`."""
        what = {"speed": "time", "memory": "peak memory"}.get(self.metric, self.metric)
        return f"{PASSES.get(self.mode, self.mode)}, {what}"

    def __str__(self) -> str:
        return f"{self.case}, {self.impl}, {self.quantity}"


class Interval(NamedTuple):
    """A ratio, and what it mostly lies within."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f}-{self.high:.3f})"


class Ratio(NamedTuple):
    """How many times the old figure the new one is, with its interval.

    Args:
        figure: what was measured.
        unit: of both spreads.
        old: in the old table.
        new: in the new one.
        device: on which; empty if the tables are of two devices, and joined all the same.
        floor: the ratio of the floor's time in the same case and pass on this device; None where a
            table has none, and for memory and the floor itself.
    """

    figure: Figure
    unit: str
    old: Spread
    new: Spread
    device: str = ""
    floor: Interval | None = None

    @property
    def middle(self) -> float:
        return self.new.median / self.old.median

    @property
    def low(self) -> float:
        return self.new.p20 / self.old.p80

    @property
    def high(self) -> float:
        return self.new.p80 / self.old.p20

    @property
    def own(self) -> Interval:
        """The ratio with its interval."""
        return Interval(self.middle, self.low, self.high)

    @property
    def judged(self) -> Interval:
        """What a limit is held against: the ratio over that of the floor where it is known, its
        interval as wide as both intervals allow."""
        if self.floor is None:
            return self.own
        return Interval(
            self.middle / self.floor.middle,
            self.low / self.floor.high,
            self.high / self.floor.low,
        )


@dataclass(frozen=True)
class Ratios:
    """What two tables have in common, and what only one of them has.

    Args:
        ratios: in the order of the new table.
        only_old: figures that the new table lacks, in words.
        only_new: figures that the old table lacks, in words.
        notes: what to know of the tables, a line each.
    """

    ratios: tuple[Ratio, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    notes: tuple[str, ...]

    def above(self, limit: float) -> list[Ratio]:
        """Ratios whose whole interval, over the floor's where it is known, lies above a limit.

        The floor is not among them: it is no implementation, and what it shows is the machine.
        """
        return [one for one in self.ratios if one.judged.low > limit and one.figure.impl != FLOOR]

    @property
    def has_several_devices(self) -> bool:
        """Whether a figure needs its device beside it."""
        return len({one.device for one in self.ratios}) > 1

    def named(self, one: Ratio) -> str:
        """A figure in words, with its device where there are several."""
        return _named(one.figure, one.device if self.has_several_devices else "")


def compare_tables(old: Path, new: Path) -> Ratios:
    """Joins two tables of `alignlab bench kernels`.

    Where a table has a figure several times (of several commits, say), the newest one counts. Of
    tables with rows of several devices, those of the devices that both have are joined.

    Raises:
        UserError: a table cannot be read, has several devices and none of the other's, or nothing
            is in both.
    """
    rows = {path: _read(path) for path in (old, new)}
    devices = {path: _values(rows[path], "gpu_name") for path in rows}
    notes = []
    if set(devices[old]) != set(devices[new]) and (len(devices[old]), len(devices[new])) != (1, 1):
        shared = [device for device in devices[old] if device in devices[new]]
        if not shared:
            several = old if len(devices[old]) > 1 else new
            raise UserError(
                f"{several} has rows of several devices ({', '.join(devices[several])}), none of "
                "which the other table has: keep the rows of one"
            )
        notes.append(f"compared on {', '.join(shared)} alone, which both tables have")
        rows = {p: [row for row in rows[p] if row["gpu_name"] in shared] for p in rows}
    together = set(devices[old]) != set(devices[new]) and not notes
    if together:
        notes.append(
            f"the devices differ, so ratios compare machines as well as code: {devices[old][0]} "
            f"(old), {devices[new][0]} (new)"
        )
    figures = {path: _figures(rows[path], together, path, notes) for path in rows}
    for name, path in (("old", old), ("new", new)):
        facts = ", ".join("/".join(_values(rows[path], fact)) for fact in FACTS)
        notes.append(f"{name}: {path}: {facts}")
    before, after = figures[old], figures[new]
    ratios = _over_the_floor(
        [
            Ratio(key[0], unit, before[key][1], spread, device=key[1])
            for key, (unit, spread) in after.items()
            if key in before
        ]
    )
    if not ratios:
        raise UserError(f"{old} and {new} have no figure in common")
    return Ratios(
        ratios,
        _only(before, after),
        _only(after, before),
        tuple(notes),
    )


def _only(mine: "Figures", other: "Figures") -> tuple[str, ...]:
    """What one table has and the other lacks, with the device where there are several."""
    several = len({device for _, device in (*mine, *other)}) > 1
    missing = [key for key in mine if key not in other]
    return tuple(_named(figure, device if several else "") for figure, device in missing)


def _named(figure: Figure, device: str) -> str:
    return f"{figure}, {device}" if device else str(figure)


def _over_the_floor(ratios: Sequence[Ratio]) -> tuple[Ratio, ...]:
    """The ratios with that of the floor in the same case and pass, where both tables have it."""
    floors = {(one.device, one.figure): one.own for one in ratios if one.figure.impl == FLOOR}
    with_floor = []
    for one in ratios:
        is_compared = one.figure.metric == "speed" and one.figure.impl != FLOOR
        figure = one.figure._replace(impl=FLOOR)
        floor = floors.get((one.device, figure)) if is_compared else None
        with_floor.append(one._replace(floor=floor))
    return tuple(with_floor)


def print_ratios(ratios: Ratios) -> None:
    """Prints the table, what only one table has, and what to know of both."""
    console = Console()
    several = ratios.has_several_devices
    has_floor = any(one.floor is not None for one in ratios.ratios)
    names = ["case", "impl", "pass, quantity", "old", "new", "new / old (interval)"]
    table = Table(*(["device"] if several else []), *names)
    if has_floor:
        table.add_column("over the floor's (interval)")
    for column in table.columns[3 + several :]:
        column.justify = "right"
    for one in ratios.ratios:
        cells = (
            *([one.device] if several else []),
            one.figure.case,
            one.figure.impl,
            one.figure.quantity,
            f"{one.old.median:.4g} {one.unit}",
            f"{one.new.median:.4g} {one.unit}",
            str(one.own),
            *([str(one.judged) if one.floor else ""] if has_floor else []),
        )
        table.add_row(*(Text(one_visible_line(cell)) for cell in cells))
    console.print(table)
    lines = [
        "interval: new 20th percentile / old 80th to new 80th / old 20th, of single steps",
        *([OVER_THE_FLOOR] if has_floor else []),
        *ratios.notes,
        *(f"only in the old table: {figure}" for figure in ratios.only_old),
        *(f"only in the new table: {figure}" for figure in ratios.only_new),
    ]
    for line in lines:
        console.print(one_visible_line(line), markup=False, highlight=False, soft_wrap=True)


def write_ratios(ratios: Ratios, out: Path) -> Path:
    """Writes the ratios as a table; gives its path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("old", "new", "ratio", "ratio_low", "ratio_high")
    over = ("over_floor", "over_floor_low", "over_floor_high")
    writer.writerow((*Figure._fields, "unit", *names, *over, "device"))
    for one in ratios.ratios:
        numbers = (one.old.median, one.new.median, *one.own)
        cells = (*one.figure, one.unit)
        shown = [f"{number:.6g}" for number in numbers]
        shown += [f"{number:.6g}" for number in one.judged] if one.floor else [""] * len(over)
        writer.writerow((*map(csv_cell, cells), *shown, csv_cell(one.device)))
    out.mkdir(parents=True, exist_ok=True)
    path = out / CSV_NAME
    write_text(path, text.getvalue())
    return path


def _read(path: Path) -> list[Row]:
    try:
        rows = speed_table.read(path)
    except ValueError as error:
        raise UserError(f"{path} is no table of `alignlab bench kernels`: {error}") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _values(rows: Iterable[Row], fact: str) -> list[str]:
    """The different values of a column, in their order."""
    return list(dict.fromkeys(row.get(fact) or "unknown" for row in rows))


Figures = dict[tuple[Figure, str], tuple[str, Spread]]


def _figures(rows: Sequence[Row], together: bool, path: Path, notes: list[str]) -> Figures:
    """The newest of each figure, by figure and device; as of one device if `together`."""
    figures: Figures = {}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        try:
            figure, spread = _figure(row)
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path}: a row holds no figure: {_shown(row)}") from None
        key = (figure, "" if together else row["gpu_name"])
        figures[key] = (row.get("metric_unit", ""), spread)
    older = len(rows) - len(figures)
    if older:
        notes.append(f"{path} has {older} older rows of the same figures: the newest count")
    return figures


def _figure(row: Row) -> tuple[Figure, Spread]:
    config = json.loads(row["extra_benchmark_config_str"])
    spread = Spread(*(float(row[f"y_value_{quantile}"]) for quantile in (50, 20, 80)))
    if not all(0 < value < float("inf") for value in spread):
        raise ValueError("not a positive number")
    figure = Figure(
        op=row["kernel_name"],
        impl=row["kernel_provider"],
        size=str(config["size"]),
        width=str(config["width"]),
        blocks=str(config["blocks"]),
        dtype=str(config["dtype"]),
        mode=row["kernel_operation_mode"],
        metric=row["metric_name"],
    )
    return figure, spread


def _shown(row: Row) -> str:
    return f"{row['kernel_name']}, {row['kernel_provider']}, {row['extra_benchmark_config_str']}"
