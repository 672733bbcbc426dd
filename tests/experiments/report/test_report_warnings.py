"""The warnings of the runs stand near the verdict in every form of the report."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.compare.run import collect
from alignlab.experiments.report.run_warnings import gather_warnings, warning_sentences
from alignlab.experiments.report.text import PRINTED_WARNINGS, print_summary
from alignlab.experiments.report.write import write_report
from alignlab.runs.run_folder import RunFolder
from made_comparisons import make_comparison

PALE = "clips <b>are</b> pale"


def warning(low: float) -> str:
    return f"{PALE} [{low} of 56.8]"


def comparison(warnings: dict[tuple[str, int], tuple[str, ...]], seeds: int = 3) -> Comparison:
    results = tuple(
        RunResult(
            variant,
            seed,
            10,
            f"{variant}/{seed}",
            {"val/flow": 0.4 + 0.01 * seed},
            {},
            notes=warnings.get((variant, seed), ()),
        )
        for variant in ("none", "ra")
        for seed in range(seeds)
    )
    return make_comparison(results)


def texts(made: Comparison, folder: Path) -> tuple[str, str, str]:
    """The report as HTML, as Markdown and as printed."""
    page = write_report(made, folder).read_text("utf-8")
    console = Console(width=1000, record=True, file=(folder / "printed.txt").open("w"))
    print_summary(made, console)
    console.file.close()
    return page, (folder / "report.md").read_text("utf-8"), console.export_text()


def test_the_same_warning_of_several_seeds_is_told_once() -> None:
    texts = gather_warnings({0: [warning(28.1), "odd"], 1: ["odd"], 2: [warning(30.1), "odd"]}, 3)
    assert texts == [
        f"seeds 0 and 2: {PALE} (seed 0: 28.1 of 56.8; seed 2: 30.1 of 56.8)",
        "all 3 seeds: odd",
    ]
    assert gather_warnings({4: [warning(28.1)]}, 1) == [f"{PALE} (28.1 of 56.8)"]
    # of three seeds one is finished
    assert gather_warnings({4: [warning(28.1)]}, 3) == [f"seed 4: {PALE} (28.1 of 56.8)"]
    assert gather_warnings({0: ["see [1] for it"], 1: []}, 2) == ["seed 0: see [1] for it"]


def test_every_form_of_the_report_warns_between_verdict_and_table(tmp_path: Path) -> None:
    made = comparison(
        {("ra", 0): (warning(28.1),), ("ra", 2): (warning(30.1),), ("none", 1): ("odd",)}
    )
    page, markdown, printed = texts(made, tmp_path)
    told = f"seeds 0 and 2: {PALE} (seed 0: 28.1 of 56.8; seed 2: 30.1 of 56.8)"
    assert warning_sentences(made) == ["variant none, seed 1: odd", f"variant ra, {told}"]
    assert '<details class="warnings" open>\n  <summary>2 warnings of 2 variants' in page
    escaped = told.replace("<", "&lt;").replace(">", "&gt;")
    assert f"<b>ra</b>, {escaped}</li>" in page and "<b>none</b>, seed 1: odd</li>" in page
    assert page.index('class="verdict"') < page.index(escaped) < page.index("<h2>Summary</h2>")
    assert (
        markdown.index("**Warnings**")
        < markdown.index(f"- variant ra, {escaped}")
        < markdown.index("| me")
    )
    assert f"Warning: variant ra, {told}" in printed
    assert printed.index("Warning: variant none, seed 1: odd") < printed.index(
        "validation flow loss ↓"
    )


def test_nothing_is_shown_without_warnings(tmp_path: Path) -> None:
    for text in texts(comparison({}), tmp_path):
        shown = text.split("</style>")[-1].split("<script>")[0]
        assert "arning" not in shown and 'class="warnings"' not in text


def test_one_seed_is_not_named(tmp_path: Path) -> None:
    page, markdown, printed = texts(comparison({("ra", 0): (warning(28.1),)}, seeds=1), tmp_path)
    assert "<b>ra</b>: clips" in page and "1 warning of 1 variant<" in page
    assert "- variant ra: clips" in markdown and "Warning: variant ra: clips" in printed


def test_many_are_folded_in_the_page_and_cut_in_the_terminal(tmp_path: Path) -> None:
    count = PRINTED_WARNINGS + 3
    many = tuple(f"block {i} may collapse [{i} of 9]" for i in range(count))
    page, markdown, printed = texts(comparison({("ra", 1): many}), tmp_path)
    assert f'<details class="warnings">\n  <summary>{count} warnings' in page
    assert markdown.count("may collapse") == page.count("may collapse") == count
    assert printed.count("may collapse") == PRINTED_WARNINGS
    assert "3 more warnings are in the report." in printed


def run_folder(folder: Path, **more: list[str]) -> RunFolder:
    run = RunFolder(folder / "ra" / "seed-0")
    run.path.mkdir(parents=True)
    run.metrics.write_text("")
    run.result.write_text(json.dumps({"steps": 3, "metrics": {"val/flow": 0.4}, **more}))
    return run


def test_warnings_of_a_run_reach_the_saved_comparison(tmp_path: Path) -> None:
    result = collect(run_folder(tmp_path, notes=[warning(28.1)]), "ra", 0, tmp_path)
    made = dataclasses.replace(comparison({}, seeds=1), results=(result,))
    made.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json").results[0].notes == (warning(28.1),)


@pytest.mark.parametrize("part", ["result", "comparison"])
def test_files_from_before_there_were_warnings_are_read(tmp_path: Path, part: str) -> None:
    made = comparison({})
    if part == "result":
        made = dataclasses.replace(
            made, results=(collect(run_folder(tmp_path), "ra", 0, tmp_path),)
        )
    made.save(tmp_path / "comparison.json")
    old = json.loads((tmp_path / "comparison.json").read_text())
    for run in old["results"]:
        assert run.pop("notes") == []
    (tmp_path / "comparison.json").write_text(json.dumps(old))
    assert Comparison.load(tmp_path / "comparison.json") == made
