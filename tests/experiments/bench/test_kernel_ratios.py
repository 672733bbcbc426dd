"""`alignlab bench compare`: two tables joined, their ratios, and the exit code of a regression."""

import csv
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from alignlab.experiments.bench.kernel_ratios import compare_tables
from alignlab.kernels.bench.csv_file import Row
from command_line import alignlab, refused
from made_up_rows import made_up_row, write_rows


def tables(tmp_path: Path, old: list[Row], new: list[Row]) -> tuple[Path, Path]:
    return write_rows(tmp_path / "old.csv", *old), write_rows(tmp_path / "new.csv", *new)


def compare(old: Path, new: Path, *options: object) -> Result:
    return alignlab("bench", "compare", old, new, "--out", old.parent / "out", *options)


def memory(row: Row, mib: float) -> Row:
    values = dict.fromkeys(("y_value_50", "y_value_20", "y_value_80"), str(mib))
    return {**row, "metric_name": "memory", "metric_unit": "MiB", **values}


def test_ratios_have_intervals_of_percentiles(tmp_path: Path) -> None:
    row = made_up_row("chunked", 10.0, noise=0.1)  # 9 to 11
    old, new = tables(tmp_path, [row, memory(row, 50)], [*_mine(5.0, 0.2), memory(row, 60)])
    result = compare(old, new)
    assert result.exit_code == 0, result.output
    assert "0.500 (0.364-0.667)" in result.stdout  # 4 / 11 to 6 / 9
    assert "1.200 (1.200-1.200)" in result.stdout
    with (tmp_path / "out" / "ratios.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["ratio"], row["ratio_low"]) for row in rows] == [
        ("speed", "0.5", "0.363636"),
        ("memory", "1.2", "1.2"),
    ]
    plot = tmp_path / "out" / "ratios_pull-push_float32.svg"
    assert f"written: {plot}" in result.stdout
    assert ">chunked</text>" in plot.read_text() and ">3x30 C=16 L=1</text>" in plot.read_text()


def _mine(milliseconds: float, noise: float, **options: Any) -> list[Row]:
    return [made_up_row("chunked", milliseconds, noise=noise, **options)]


@pytest.mark.parametrize(
    ("milliseconds", "limit", "code"),
    [
        (10.0, 1.05, 0),
        (10.8, 1.05, 0),  # the interval, 1.037 to 1.124, holds the limit
        (11.0, 1.05, 1),
        (11.0, 1.2, 0),
        (2.0, 1.05, 0),
    ],
)
def test_a_regression_is_one_whose_interval_lies_above_the_limit(
    milliseconds: float, limit: float, code: int, tmp_path: Path
) -> None:
    old, new = tables(tmp_path, _mine(10.0, 0.02), _mine(milliseconds, 0.02))
    result = compare(old, new, "--fail-above", limit)
    assert result.exit_code == code, result.output
    assert ("above" in result.stderr) == (code == 1)
    if code:
        assert result.stderr.startswith(
            "above 1.05: pull_push 3x30 C=16 L=1 float32, chunked, forward + backward, time: 1.100"
        )
    assert compare(old, new).exit_code == 0


def test_memory_can_fail_and_the_floor_cannot(tmp_path: Path) -> None:
    row = made_up_row("chunked", 10.0)
    old, new = tables(tmp_path, [memory(row, 50)], [memory(row, 60)])
    assert compare(old, new, "--fail-above", 1.05).exit_code == 1
    old, new = tables(tmp_path, [made_up_row("floor", 10.0)], [made_up_row("floor", 20.0)])
    result = compare(old, new, "--fail-above", 1.05)
    assert result.exit_code == 0 and "2.000" in result.stdout


@pytest.mark.parametrize(
    ("floor", "milliseconds", "code"),
    [
        (10.8, 10.8, 0),  # the machine is slower, the code as fast as it was
        (10.0, 10.8, 1),
        (9.0, 10.0, 1),  # the machine is faster, and the code does not show it
        (None, 10.8, 1),
    ],
)
def test_the_drift_of_the_floor_is_divided_out(
    floor: float | None, milliseconds: float, code: int, tmp_path: Path
) -> None:
    rows = [_mine(ms, 0.002) for ms in (10.0, milliseconds)]
    floors = [] if floor is None else [made_up_row("floor", ms, noise=0.002) for ms in (10, floor)]
    pairs = [[*one, *floors[i : i + 1]] for i, one in enumerate(rows)]
    old, new = tables(tmp_path, *pairs)
    result = compare(old, new, "--fail-above", 1.05)
    assert result.exit_code == code, result.output
    with (tmp_path / "out" / "ratios.csv").open() as file:
        mine = next(row for row in csv.DictReader(file) if row["impl"] == "chunked")
    if floor is None:
        assert mine["over_floor"] == "" and "over the floor's" not in result.stdout
        return
    want = milliseconds / floor
    assert float(mine["over_floor"]) == pytest.approx(want, rel=1e-4)
    spread = (1.002 / 0.998) ** 2
    assert float(mine["over_floor_low"]) == pytest.approx(want / spread, rel=1e-4)
    assert float(mine["over_floor_high"]) == pytest.approx(want * spread, rel=1e-4)
    assert f"{milliseconds / 10:.3f} (" in result.stdout and f"{want:.3f} (" in result.stdout
    if code:
        told = f"chunked, forward + backward, time: {want:.3f} ("
        assert told in result.stderr and f"), {milliseconds / 10:.3f} (" in result.stderr


def test_memory_and_other_cases_are_not_held_against_the_floor(tmp_path: Path) -> None:
    floor, row = made_up_row("floor", 10.0), made_up_row("chunked", 10.0, width=32)
    slower = made_up_row("floor", 20.0)
    old, new = tables(
        tmp_path, [floor, memory(row, 50), row], [slower, memory(row, 60), *_mine(20, 0, width=32)]
    )
    said = compare(old, new, "--fail-above", 1.05).stderr
    assert said.count("above 1.05: ") == 2 and "floor" not in said


def test_each_row_of_several_devices_names_its_own(tmp_path: Path) -> None:
    a, b = "Card A", "Card B"
    rows = {card: _mine(ms, 0.01, gpu_name=card) for card, ms in ((a, 10.0), (b, 20.0))}
    worse = _mine(40.0, 0.01, gpu_name=b)
    only = _mine(1.0, 0.01, gpu_name=a, width=32)
    floor = [made_up_row("floor", ms, gpu_name=a) for ms in (1.0, 2.0)]
    old, new = tables(tmp_path, [*rows[a], *rows[b], floor[0]], [*worse, *rows[a], *only, floor[1]])
    result = compare(old, new, "--fail-above", 1.05)
    assert result.exit_code == 1 and "alone" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert ", time, Card B: 2.000 (" in line
    assert "C=32 L=1 float32, chunked, forward + backward, time, Card A" in result.stdout
    with (tmp_path / "out" / "ratios.csv").open() as file:
        ratios = {(row["impl"], row["device"]): row["ratio"] for row in csv.DictReader(file)}
    assert ratios == {("chunked", a): "1", ("chunked", b): "2", ("floor", a): "2"}
    table = [line for line in result.stdout.splitlines() if "│" in line]
    assert [sum(card in line for line in table) for card in (a, b)] == [2, 1]
    plot = (tmp_path / "out" / "ratios_pull-push_float32.svg").read_text()
    assert ">3x30 C=16 L=1 Card A</text>" in plot and ">3x30 C=16 L=1 Card B</text>" in plot


def test_rows_that_only_one_table_has_are_told(tmp_path: Path) -> None:
    both = _mine(10.0, 0.01)
    old, new = tables(
        tmp_path,
        [*both, made_up_row("eager", 9.0)],
        [*both, made_up_row("mine", 9.0), *_mine(9.0, 0.1, width=32)],
    )
    said = compare(old, new).stdout
    where = "pull_push 3x30 C=16 L=1 float32"
    assert f"only in the old table: {where}, eager, forward + backward, time" in said
    assert f"only in the new table: {where}, mine, forward + backward, time" in said
    assert "only in the new table: pull_push 3x30 C=32 L=1 float32, chunked" in said


def test_other_devices_and_commits_are_told(tmp_path: Path) -> None:
    old, new = tables(
        tmp_path,
        _mine(10.0, 0.01, gpu_name="Card A", commit="aaa"),
        _mine(5.0, 0.01, gpu_name="Card B", commit="bbb"),
    )
    said = compare(old, new).stdout
    assert "the devices differ" in said and "Card A (old), Card B (new)" in said
    assert f"old: {old}: Card A, aaa, " in said and f"new: {new}: Card B, bbb, " in said
    assert "0.500" in said


def test_of_several_devices_those_of_both_are_joined(tmp_path: Path) -> None:
    a, b, c = (f"Card {name}" for name in "ABC")
    rows = {card: _mine(ms, 0.01, gpu_name=card) for card, ms in ((a, 10.0), (b, 20.0), (c, 40.0))}
    old, new = tables(tmp_path, [*rows[a], *rows[b]], [*rows[c], *rows[b]])
    ratios = compare_tables(old, new)
    (ratio,) = ratios.ratios
    assert ratio.middle == 1.0 and ratio.old.median == 20.0
    assert ratios.only_old == ratios.only_new == ()
    assert "compared on Card B alone, which both tables have" in compare(old, new).stdout
    write_rows(new, *rows[c])
    line = refused("bench", "compare", old, new)
    assert "old.csv has rows of several devices (Card A, Card B), none of which" in line


def test_the_newest_row_of_a_figure_counts(tmp_path: Path) -> None:
    first, again = (
        _mine(ms, 0.01, timestamp=f"2026-01-0{day} 00:00:00", commit=f"c{day}")
        for ms, day in ((10.0, 1), (20.0, 2))
    )
    old, new = tables(tmp_path, [*again, *first], again)
    ratios = compare_tables(old, new)
    assert [one.middle for one in ratios.ratios] == [1.0]
    assert f"{old} has 1 older rows of the same figures: the newest count" in ratios.notes


def test_what_is_no_table_is_one_line(tmp_path: Path) -> None:
    old, new = tables(tmp_path, _mine(10.0, 0.01), _mine(10.0, 0.01, width=32))
    assert "have no figure in common" in refused("bench", "compare", old, new)
    missing = tmp_path / "none.csv"
    assert f"{missing} is no table of" in refused("bench", "compare", old, missing)
    new.write_text("a,b\n1,2\n")
    assert "it has no column kernel_name" in refused("bench", "compare", old, new)
    new.write_text(old.read_text().splitlines()[0] + "\n")
    assert f"{new} has no rows" in refused("bench", "compare", old, new)
    new.write_text(old.read_text().replace("10.1", "fast"))
    assert f"{new}: a row holds no figure: pull_push, chunked" in refused(
        "bench", "compare", old, new
    )


def test_text_of_a_table_is_shown_and_not_run(tmp_path: Path) -> None:
    old, new = tables(
        tmp_path,
        _mine(10.0, 0.01, kernel_provider="=[b]$x_\x1b[1m", gpu_name="[red]a"),
        _mine(10.0, 0.01, kernel_provider="=[b]$x_\x1b[1m", gpu_name="[red]a"),
    )
    result = compare(old, new)
    assert result.exit_code == 0, result.output
    assert r"=[b]$x_\x1b[1m" in result.stdout and "[red]a" in result.stdout
    assert "'=[b]" in (tmp_path / "out" / "ratios.csv").read_text()
