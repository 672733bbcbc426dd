"""How far the baseline's two trainings differ, and what a report says of it in every form."""

import csv
import dataclasses
import io
import json
import re
from html import unescape
from pathlib import Path

import pytest
from rich.console import Console

from alignlab.errors import UserError
from alignlab.experiments.compare.finding import Expectation, Finding
from alignlab.experiments.compare.result import Comparison, Curve, RunResult
from alignlab.experiments.report.noise_floor import FloorRow, NoiseFloor, noise_floor
from alignlab.experiments.report.summary import summary_rows
from alignlab.experiments.report.text import print_summary
from alignlab.experiments.report.write import write_report
from made_comparisons import make_comparison
from run_contents import read_table

BASE = [0.40, 0.50, 0.60, 0.70, 0.80]
WIGGLE = [0.001, -0.002, 0.0015, -0.001, 0.0005]


def runs(variant: str, flows: list[float]) -> list[RunResult]:
    return [
        RunResult(variant, seed, 10, "", {"val/flow": flow, "time/step": 0.1 + seed}, {})
        for seed, flow in enumerate(flows)
    ]


def plus(*shifts: float) -> list[float]:
    return [flow + shift for flow, shift in zip(BASE, shifts, strict=False)]


def made(again: list[float], **variants: list[float]) -> Comparison:
    """The baseline with as many seeds as its second training, and variants."""
    results = runs("none", BASE[: len(again)])
    for variant, flows in variants.items():
        results += runs(variant, flows)
    return make_comparison(results, again=tuple(runs("none-again", again)))


def floor_of(comparison: Comparison) -> NoiseFloor:
    found = noise_floor(comparison, summary_rows(comparison))
    assert found is not None
    return found


def row_of(comparison: Comparison, metric: str = "val/flow") -> FloorRow:
    (row,) = [row for row in floor_of(comparison).rows if row.metric == metric]
    return row


def forms(comparison: Comparison, folder: Path) -> dict[str, str]:
    """What each form of the report says, in one line."""
    page = write_report(comparison, folder).read_text().split("<noscript>")[0]
    console = Console(width=1000, file=io.StringIO())
    print_summary(comparison, console)
    assert isinstance(console.file, io.StringIO)
    texts = {
        "page": unescape(re.sub("<[^>]*>", " ", page)),
        "markdown": (folder / "report.md").read_text().replace("\\", ""),
        "terminal": console.file.getvalue(),
    }
    return {form: re.sub(r"\s+", " ", text) for form, text in texts.items()}


def test_without_a_second_training_nothing_is_said(tmp_path: Path) -> None:
    found = dataclasses.replace(made(BASE[:3], a=plus(*WIGGLE)), again=())
    assert noise_floor(found, summary_rows(found)) is None
    (tmp_path / "noise_floor.csv").touch()  # of an earlier report
    for text in forms(found, tmp_path).values():
        assert "oise floor" not in text
    assert not (tmp_path / "noise_floor.csv").exists()


@pytest.mark.parametrize(("seeds", "which"), [(1, "seed 0"), (2, "both seeds"), (3, "all 3 seeds")])
def test_trainings_that_end_alike(tmp_path: Path, seeds: int, which: str) -> None:
    found = made(BASE[:seeds], a=plus(*WIGGLE[:seeds]))
    told = f"Noise floor: none trained twice ends with the same numbers with {which}."
    assert floor_of(found).sentence == told and floor_of(found).warnings == []
    for form, text in forms(found, tmp_path).items():
        assert told in text, form
    (line,) = read_table(tmp_path / "noise_floor.csv")  # a time is no noise floor
    assert line["metric"] == "val/flow"
    assert line["largest"] == "0.0" and line["num_equal"] == line["num_pairs"] == str(seeds)


def test_trainings_that_differ_by_chance(tmp_path: Path) -> None:
    found = made(plus(0.004, -0.003, 0.0), a=plus(0.01, -0.02, 0.03), b=plus(0.1, -0.2, 0.3))
    row = row_of(found)
    assert row.differences == pytest.approx({0: 0.004, 1: -0.003, 2: 0.0})
    assert row.largest == pytest.approx(0.004) and row.num_equal == 1
    assert row.paired is not None and row.paired.mean == pytest.approx(0.001 / 3)
    assert row.paired.confidence == pytest.approx(0.95)
    could_see = [r.paired.detectable for r in summary_rows(found) if r.variant == "a" and r.paired]
    assert row.detectable == could_see[0], "the better of the two"
    told = (
        "Noise floor: none trained twice with all 3 seeds differs by up to 0.004 in validation "
        f"flow loss (could have seen {row.detectable:.2g})."
    )
    assert floor_of(found).sentence == told and floor_of(found).warnings == []
    shown = forms(found, tmp_path)
    for form, text in shown.items():
        assert told in text, form
    mean = r"0\.0003 \[\N{MINUS SIGN}0\.008\d, 0\.009\d\]"
    for form in ("page", "markdown"):
        cells = rf"validation flow loss[ |]+0\.004[ |]+\+{mean}[ |]+1/3[ |]+{row.detectable:.2g} "
        assert re.search(cells, shown[form]), form
    (line,) = read_table(tmp_path / "noise_floor.csv")
    assert float(line["largest"]) == row.largest and line["num_equal"] == "1"
    assert float(line["diff_mean"]) == row.paired.mean and float(line["diff_low"]) < 0
    assert float(line["diff_seed_1"]) == row.differences[1] == BASE[1] - 0.003 - BASE[1]
    assert line["smallest_claimed"] == line["largest_claimed"] == ""


def test_trainings_that_differ_by_more_than_chance_are_warned_of(tmp_path: Path) -> None:
    found = made(plus(*(0.01 + shift for shift in WIGGLE)), a=plus(*WIGGLE))
    (warning,) = floor_of(found).warnings
    assert warning.startswith(
        "Noise floor: none trained twice differs by more than chance: validation flow loss +0.0100 "
    )
    for form, text in forms(found, tmp_path).items():
        assert warning in text, form


def test_one_of_many_metrics_is_no_reason_to_warn() -> None:
    """Its own interval excludes 0, as one in twenty does; corrected over all, it does not."""
    names = ["silhouette/mean", "cknna/mean", "gen/identity_proxy", "gen/found_proxy"]
    shifted = plus(*(0.002 + shift for shift in WIGGLE))
    alone = made(shifted, a=plus(*WIGGLE))
    assert floor_of(alone).warnings != []

    def widened(run: RunResult) -> RunResult:
        more = {name: float(run.seed) for name in names}
        return dataclasses.replace(run, metrics=run.metrics | more)

    many = dataclasses.replace(
        alone,
        results=tuple(map(widened, alone.results)),
        again=tuple(map(widened, alone.again)),
    )
    assert floor_of(many).warnings == []
    assert "; not at all in " in floor_of(many).sentence


def test_claims_that_are_smaller_than_the_noise_are_warned_of(tmp_path: Path) -> None:
    small = plus(*(0.01 + shift for shift in WIGGLE))
    large = plus(*(0.3 + shift for shift in WIGGLE))
    found = made(plus(0.05, -0.04, 0.03, -0.02, 0.0), small=small, large=large)
    (warning,) = floor_of(found).warnings
    assert "smaller than what two equal trainings differ by with one seed" in warning
    assert "validation flow loss of small (0.01; none trained twice: 0.05)." in warning
    assert "large" not in warning.removeprefix("Noise floor: ")
    for form, text in forms(found, tmp_path).items():
        assert warning in text, form
        assert form == "terminal" or "0.01 (small), 0.3 (large)" in text
    (line,) = read_table(tmp_path / "noise_floor.csv")
    assert float(line["smallest_claimed"]) == pytest.approx(0.01)
    assert float(line["largest_claimed"]) == pytest.approx(0.3)


def test_trainings_that_differ_where_the_summary_does_not_look() -> None:
    def binned(run: RunResult) -> RunResult:
        value = 0.1 if run.variant == "none" else 0.2
        return dataclasses.replace(run, metrics=run.metrics | {"val/flow/t3": value})

    found = made(BASE[:2])
    first, second = tuple(map(binned, found.results)), tuple(map(binned, found.again))
    assert floor_of(dataclasses.replace(found, results=first, again=second)).sentence == (
        "Noise floor: none trained twice with both seeds differs in 1 of 2 numbers, none of them "
        "in the summary table (noise_floor.csv)."
    )


def test_missing_and_diverged_second_trainings_are_told(tmp_path: Path) -> None:
    whole = made(BASE[:3], a=plus(*WIGGLE[:3]))
    found = dataclasses.replace(whole, again=whole.again[:1])
    told = "the same numbers with seed 0. With seeds 1, 2 there are not both trainings."
    assert all(told in text for text in forms(found, tmp_path).values())
    assert read_table(tmp_path / "noise_floor.csv")[0]["diff_seed_2"] == ""
    first = dataclasses.replace(whole.again[0], diverged=True, metrics={"val/flow": 70.0})
    found = dataclasses.replace(whole, again=(first, *whole.again[1:]))
    told = "Noise floor: none trained a second time DIVERGED with seed 0 (its validation loss ended"
    assert all(told in text for text in forms(found, tmp_path).values())
    found = dataclasses.replace(whole, results=whole.results[3:])
    assert floor_of(found).sentence.startswith(
        "Noise floor: none trained twice: nothing was measured in both trainings. With seeds 0, 1, "
    )


def test_a_second_training_with_no_number_is_no_size_to_hold_claims_against() -> None:
    whole = made(plus(0.0, 0.0, 0.0), a=plus(*(-0.1 + w for w in WIGGLE[:3])))
    first = dataclasses.replace(whole.again[0], metrics={"val/flow": float("nan")})
    found = floor_of(dataclasses.replace(whole, again=(first, *whole.again[1:])))
    assert "differs by up to a number that is not finite in validation flow loss" in found.sentence
    assert not found.warnings


def test_the_steps_to_target_of_the_second_training(tmp_path: Path) -> None:
    def curve(last: float) -> dict[str, Curve]:
        return {"val/flow": ((5, 1.0), (10, last))}

    def measured(run: RunResult) -> RunResult:
        return dataclasses.replace(run, measured=curve(run.metrics["val/flow"]))

    whole = made(plus(-0.06, 0.01, 0.0), a=plus(*WIGGLE[:3]))
    found = dataclasses.replace(
        whole, results=tuple(map(measured, whole.results)), again=tuple(map(measured, whole.again))
    )
    row = row_of(found, "steps_to_target")
    sooner = 5 * 2 ** (0.6 / 0.66) / 10 - 1  # linear in the logarithm of the step
    assert row.differences == pytest.approx({0: sooner, 1: 0.0, 2: 0.0})
    assert row.num_equal == 1, "ending above the target is not to be equal"
    told = f"{100 * -sooner:.2g}%, never in 1/3 in steps to target"
    assert told in floor_of(found).sentence
    write_report(found, tmp_path)
    lines = read_table(tmp_path / "noise_floor.csv")
    assert lines[1]["diff_mean"] == "", "only a bound of it is known"
    assert [line["metric"] for line in lines] == ["val/flow", "steps_to_target"]
    expected = Expectation(variant="a", metric="val/flow", change="lower")
    finding = Finding(claim="c", source="s", limits="l", expect=(expected,))
    checking = dataclasses.replace(found, finding=finding)
    assert row_of(checking, "steps_to_target") == row, "a finding is of other variants"
    assert lines[1]["diff_scale"] == "log ratio" and lines[1]["never_reached_seeds"] == "1"


def test_older_files_have_no_second_training(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    found = made(BASE[:3], a=plus(*WIGGLE[:3]))
    found.save(path)
    assert Comparison.load(path) == found
    content = json.loads(path.read_text())
    twice = {**content, "again": content["again"] * 2}
    path.write_text(json.dumps(twice))
    with pytest.raises(UserError, match=r"not a comparison: .*no distinct seeds of 'made up'"):
        Comparison.load(path)
    path.write_text(json.dumps({**content, "again": content["results"][-3:]}))
    with pytest.raises(UserError, match="no second training of 'none'"):
        Comparison.load(path)
    del content["again"]
    path.write_text(json.dumps(content))
    assert Comparison.load(path) == dataclasses.replace(found, again=())


def test_names_and_formulas_cannot_break_out_of_the_noise_floor(tmp_path: Path) -> None:
    nasty = "=1|<script>"
    one = [RunResult(nasty, 0, 1, "", {"val/flow": 1.0, "=2+2": 1.0}, {})]
    two = [RunResult(f"{nasty}-again", 0, 1, "", {"val/flow": 2.0, "=2+2": 1.0}, {})]
    found = make_comparison(one, baseline=nasty, again=tuple(two))
    page = write_report(found, tmp_path).read_text()
    assert "=1|&lt;script&gt; trained twice" in page and nasty not in page
    assert "Noise floor: =1\\|&lt;script&gt; trained" in (tmp_path / "report.md").read_text()
    with (tmp_path / "noise_floor.csv").open() as file:
        assert [cells[0] for cells in csv.reader(file)] == ["metric", "val/flow", "'=2+2"]
