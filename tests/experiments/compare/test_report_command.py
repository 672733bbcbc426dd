"""`alignlab report`: reports of finished comparisons, written again, of a part, or of several."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignlab.experiments.compare.outputs import read_comparison
from alignlab.experiments.compare.result import Comparison
from alignlab.runs.checksums import damaged_files, read_checksums
from command_line import alignlab, refused
from recipe_comparisons import recipe_comparison, written

VARIANTS = ("none", "refalign", "repa")
TEXTS = ("report.html", "report.md", "table.csv", "table.tex", "steps.csv")


@pytest.fixture(scope="module")
def whole() -> Comparison:
    return recipe_comparison(VARIANTS, (0, 1, 2))


@pytest.fixture(scope="module")
def made(whole: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(whole, tmp_path_factory.mktemp("made") / "whole", clips=True)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "runs" / "whole"))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in table(folder)))


def is_whole(folder: Path) -> bool:
    checksums = read_checksums(folder)
    return set(TEXTS) <= set(checksums or {}) and not damaged_files(folder, checksums or {})


def report(*arguments: object) -> str:
    result = alignlab("report", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_all_files_are_made_again_from_the_numbers_alone(folder: Path) -> None:
    before = {name: (folder / name).read_text() for name in TEXTS}
    for name in TEXTS:
        (folder / name).unlink()
    output = report(folder)
    assert {name: (folder / name).read_text() for name in TEXTS} == before
    assert f"report: {folder}/report.html" in output
    assert "Against the baseline none, over 3 seeds" in output
    assert is_whole(folder)


def test_an_older_file_is_written_with_its_schema(folder: Path) -> None:
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    del content["schema"]
    path.write_text(json.dumps(content))
    (folder / "checksums.json").unlink()
    before = Comparison.load(path)
    report(path)  # the file in the folder stands for it
    assert json.loads(path.read_text())["schema"] and Comparison.load(path) == before


def test_a_part_is_written_elsewhere(folder: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "part", (folder / "comparison.json").read_bytes()
    report(folder, "--out", out, "--variants", "repa", "--seeds", "0, 2", "--metrics", "val/flow")
    assert column(out, "variant") == ["none", "repa"]
    assert "seed_2" in table(out)[0] and "seed_1" not in table(out)[0]
    assert column(out, "metric") == ["val/flow", "steps_to_target", "val/flow/t0", "val/flow/t7"]
    found, _ = read_comparison(out)
    assert {run.variant for run in found.results} == {"none", "repa"}
    assert set(found.differing) < set(recipe_comparison(VARIANTS).differing)
    assert (folder / "comparison.json").read_bytes() == before
    assert is_whole(out)


def test_metrics_may_be_named_with_their_part(folder: Path, tmp_path: Path) -> None:
    report(folder, "--out", tmp_path / "mean", "--metrics", "cross_cos/mean,time/step")
    assert column(tmp_path / "mean", "metric") == ["cross_cos/mean", "time/step"]
    report(folder, "--out", tmp_path / "steps", "--metrics", "steps_to_target")
    assert "steps_to_target" in column(tmp_path / "steps", "metric")


def test_another_baseline(folder: Path, tmp_path: Path) -> None:
    report(folder, "--out", tmp_path / "other", "--baseline", "repa")
    old = {row["variant"]: row for row in table(folder) if row["metric"] == "val/flow"}
    new = {row["variant"]: row for row in table(tmp_path / "other") if row["metric"] == "val/flow"}
    assert float(new["none"]["diff_mean"]) == pytest.approx(-float(old["repa"]["diff_mean"]))
    assert new["repa"]["diff_mean"] == ""


def test_the_clips_are_found_from_the_new_folder(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "far" / "away"
    report(folder, "--out", out)
    found, _ = read_comparison(out)
    for run in found.results:
        (clip,) = run.samples
        video = out / run.run_dir / clip.video
        assert video.read_bytes() == f"{run.variant} {run.seed}".encode()
    assert (out / "report.html").read_text().count("data:video/mp4") == len(VARIANTS)
    (folder / "repa" / "seed-1" / "samples" / "0.mp4").unlink()
    report(folder, "--out", out)
    lacking = [run for run in read_comparison(out)[0].results if not run.samples]
    assert [(run.variant, run.seed) for run in lacking] == [("repa", 1)]
    assert "clips of 1 runs are not there (repa with seed 1)" in caplog.text


def test_seeds_of_two_folders_are_one_report(
    folder: Path, whole: Comparison, tmp_path: Path
) -> None:
    parts = [
        written(recipe_comparison(VARIANTS, seeds), tmp_path / f"part-{seeds[0]}", clips=True)
        for seeds in ((0, 1), (2,))
    ]
    out = tmp_path / "merged"
    report(*parts, "--out", out)
    assert (out / "table.csv").read_text() == (folder / "table.csv").read_text()
    assert (out / "steps.csv").read_text() == (folder / "steps.csv").read_text()
    assert "data:video/mp4" in (out / "report.html").read_text()
    assert is_whole(out)
    again = (out / "table.csv").read_bytes()
    report(*parts, parts[0], "--out", out)  # a folder counts once, and a report may be replaced
    assert (out / "table.csv").read_bytes() == again


def test_how_many_seeds_are_needed_is_printed_and_nothing_written(
    folder: Path, tmp_path: Path
) -> None:
    more = written(recipe_comparison(VARIANTS, (3, 4)), tmp_path / "more")
    before = sorted(tmp_path.rglob("*"))
    assert "in val/flow with 80% power" in report(folder, "--power", "0.01")
    output = report(folder, more, "--power", "0.01", "--metric", "cross_cos/mean")
    lines = [line.split() for line in output.splitlines()]
    assert [line[:2] for line in lines if line[:1] in (["refalign"], ["repa"])] == [
        ["refalign", "5"],
        ["repa", "5"],
    ]
    assert sorted(tmp_path.rglob("*")) == before


def test_no_comparison_is_written_over(folder: Path, tmp_path: Path) -> None:
    other = written(recipe_comparison(VARIANTS, (3, 4)), tmp_path / "other")
    before = {one: (one / "comparison.json").read_bytes() for one in (folder, other)}
    told = refused("report", folder, "--out", folder, "--variants", "repa")
    assert told.startswith(f"error: --out: {folder} is what is to be reported on")
    assert "is what is to be reported on" in refused("report", folder, other, "--out", other)
    third = written(recipe_comparison(VARIANTS, (5,)), tmp_path / "third")
    told = refused("report", folder, other, "--out", third)
    assert told.startswith(f"error: --out: {third} holds a comparison of its own")
    assert before == {one: (one / "comparison.json").read_bytes() for one in before}


def test_a_report_in_place_loses_no_clips(folder: Path) -> None:
    (folder / "repa" / "seed-1" / "samples" / "0.mp4").unlink()
    before = (folder / "report.html").read_bytes()
    told = refused("report", folder)
    assert told.startswith(f"error: {folder}: clips of repa with seed 1 are not there")
    assert (folder / "report.html").read_bytes() == before
    (folder / "report.html").unlink()  # there is nothing to lose
    report(folder)


def test_a_copy_of_a_comparison_is_not_taken_for_its_folder(folder: Path) -> None:
    copy = folder / "copy.json"
    copy.write_bytes((folder / "comparison.json").read_bytes())
    assert "copy.json is not the comparison.json" in refused("report", copy)


def test_no_seeds_are_told_where_nothing_would_be_claimed(
    whole: Comparison, tmp_path: Path
) -> None:
    runs = [
        dataclasses.replace(run, diverged=(run.variant, run.seed) == ("none", 1))
        for run in whole.results
    ]
    diverged = dataclasses.replace(whole, results=tuple(runs))
    output = report(written(diverged, tmp_path / "diverged"), "--power", "0.01")
    assert output.count("the baseline diverged") == 2


REFUSED: dict[str, tuple[list[Any], str]] = {
    "unfinished": (
        ["{trained}"],
        "{trained}: 1 of 2 runs finished, so there is no comparison.json",
    ),
    "no folder": (["nowhere"], "nowhere: no comparison there: alignlab compare writes"),
    "two without out": (
        ["{folder}", "{folder}/comparison.json"],
        "--out: missing; the report of 2",
    ),
    "part in place": (["{folder}", "--seeds", "0"], "--out: missing; with --seeds, {folder} would"),
    "out in use": (["{folder}", "--out", "{trained}"], "is where a comparison trained"),
    "out is a file": (["{folder}", "--out", "{folder}/table.csv"], "--out: "),
    "variant": (
        ["{folder}", "--out", "x", "--variants", "rap"],
        "--variants: unknown variant 'rap'",
    ),
    "baseline": (["{folder}", "--out", "x", "--baseline", "a"], "--baseline: unknown variant 'a'"),
    "seed": (
        ["{folder}", "--out", "x", "--seeds", "7"],
        "--seeds: no runs with seed 7; there are 0",
    ),
    "no seed": (["{folder}", "--out", "x", "--seeds", "a"], "--seeds: expected whole numbers"),
    "empty": (["{folder}", "--out", "x", "--seeds", "1,,2"], "lists nothing between two commas"),
    "metric": (["{folder}", "--out", "x", "--metrics", "flow"], "--metrics: unknown metric 'flow'"),
    "power": (["{folder}", "--power", "-1"], "--power: expected a difference above 0"),
    "power out": (["{folder}", "--power", "1", "--out", "x"], "--power: nothing is written"),
    "lonely metric": (["{folder}", "--metric", "val/flow"], "--metric: it is of --power"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_command_refuses(
    what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "trained"
    for seed in ("seed-0", "seed-1"):
        (trained / "none" / seed).mkdir(parents=True)
        (trained / "none" / seed / "recipe.yaml").touch()
    (trained / "none" / "seed-0" / "result.json").touch()
    arguments, message = REFUSED[what]
    names = {"folder": folder, "trained": trained}
    given = [str(argument).format(**names) for argument in arguments]
    assert message.format(**names) in refused("report", *given)
    assert not (tmp_path / "x").exists()
