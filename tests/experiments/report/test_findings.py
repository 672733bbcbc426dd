"""What is said of a published finding: never more than the report claims, and the page of all."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignlab.errors import UserError
from alignlab.experiments.compare.finding import Finding
from alignlab.experiments.compare.result import (
    Comparison,
    Cost,
    Curve,
    Ratio,
    RunResult,
    VariantCost,
)
from alignlab.experiments.report.findings import Judged, JudgedFinding, judge
from alignlab.experiments.report.findings_page import LEFT_OUT, findings_markdown, read_findings
from alignlab.experiments.report.summary import summary_rows
from alignlab.experiments.report.text import markdown, print_summary
from alignlab.experiments.report.write import write_report
from browser_tools import FIRST_SCRIPT
from command_line import alignlab, refused
from made_comparisons import make_comparison

SEEDS = range(5)
WIGGLE = (0.0, 0.003, -0.002, 0.001, -0.001)
LAST = {"none": 0.5, "fast": 0.3}
"""Validation loss at the end, which curves fall to from 0.8 in the middle."""


def run(variant: str, seed: int, diverged: bool = False, **metrics: float) -> RunResult:
    measured: dict[str, Curve] = {}
    if variant in LAST:
        wiggle = WIGGLE[(seed + 2 * (variant == "fast")) % len(WIGGLE)]
        metrics["val/flow"] = LAST[variant] + wiggle
        measured["val/flow"] = ((50, 0.8), (100, metrics["val/flow"]))
    return RunResult(variant, seed, 100, "run", metrics, {}, diverged=diverged, measured=measured)


def compared(**changes: Any) -> Comparison:
    """`lower` lies below the baseline in every metric, `higher` above, `same` on both sides.

    `fast` is at the baseline's last loss after about 80 of its 100 steps.
    """
    runs = []
    for seed in SEEDS:
        w, v = WIGGLE[seed], WIGGLE[(seed + 2) % len(WIGGLE)]
        runs += [
            run("none", seed, frechet=0.5 + w),
            run("fast", seed, frechet=0.5 + w),
            run("lower", seed, frechet=0.4 + w + v),
            run("higher", seed, frechet=0.6 + w + v),
            run("same", seed, frechet=0.5 + w + v),
        ]
    return make_comparison(runs, **changes)


def finding(*expect: tuple[str, str, str], **texts: str) -> Finding:
    shared = {"claim": "It is so.", "source": "arXiv 1234.56789", "limits": "It is small."} | texts
    names = ("variant", "metric", "change")
    return Finding.model_validate(
        {**shared, "expect": [dict(zip(names, one, strict=True)) for one in expect]}
    )


def judged(made: Comparison, *expect: tuple[str, str, str]) -> JudgedFinding:
    made = replace(made, finding=finding(*expect))
    found = judge(made, summary_rows(made))
    assert found is not None
    return found


def one(made: Comparison, *expect: str) -> Judged:
    variant, metric, change = expect
    (only,) = judged(made, (variant, metric, change)).expectations
    return only


def with_runs(*changed: RunResult) -> Comparison:
    """The comparison with other runs in the place of those of the same variant and seed."""
    keys = {(run.variant, run.seed) for run in changed}
    made = compared()
    kept = [run for run in made.results if (run.variant, run.seed) not in keys]
    return make_comparison([*kept, *changed])


def test_a_comparison_without_a_finding_says_nothing_of_one() -> None:
    made = compared()
    rows = summary_rows(made)
    assert judge(made, rows) is None
    assert "Finding" not in markdown(made, rows)


@pytest.mark.parametrize(
    ("variant", "change", "expected"),
    [
        ("lower", "lower", "reproduced"),
        ("lower", "higher", "opposite"),
        ("higher", "higher", "reproduced"),
        ("higher", "lower", "opposite"),
        ("same", "lower", "not seen"),
        ("same", "higher", "not seen"),
    ],
)
def test_an_expectation_is_judged_by_the_claim_of_the_report(
    variant: str, change: str, expected: str
) -> None:
    found = one(compared(), variant, "frechet", change)
    assert found.outcome == expected and found.num_seeds == 5
    assert re.search(r"\d \[.+, .+\]", found.found), found.found
    assert ("could have seen 0.00" in found.found) == (expected == "not seen")
    assert (", p " in found.found) == (expected != "not seen")


def test_steps_to_target_are_judged_by_their_ratio() -> None:
    assert one(compared(), "fast", "steps_to_target", "lower").outcome == "reproduced"
    slower = one(compared(), "fast", "steps_to_target", "higher")
    assert slower.outcome == "opposite" and "%" in slower.found


def test_a_target_that_is_never_reached_is_not_seen() -> None:
    curves: dict[str, Curve] = {"val/flow": ((50, 0.95), (100, 0.9))}
    late = [
        RunResult("late", seed, 100, "run", {"val/flow": 0.9}, {}, measured=curves)
        for seed in SEEDS
    ]
    found = one(with_runs(*late), "late", "steps_to_target", "lower")
    assert found.outcome == "not seen" and "5 of 5 seeds never reached it" in found.found


def test_a_cost_that_is_measured_once_is_judged_by_its_interval() -> None:
    slow, equal = Ratio(1.2, 1.1, 1.3), Ratio(1.0)
    costs = {
        name: VariantCost(1.0, slow if name == "same" else equal, 10, None, 5)
        for name in compared().variants
    }
    cost = Cost(rounds=6, data_steps=1, seed=0, device="cpu", beyond=0.0, variants=costs)
    made = compared(cost=cost)
    assert one(made, "same", "cost/step", "higher").outcome == "reproduced"
    assert one(made, "same", "cost/step", "lower").outcome == "opposite"
    assert one(made, "lower", "cost/step", "lower").outcome == "not seen"


def test_a_metric_that_no_run_has_is_not_measured() -> None:
    found = one(compared(), "lower", "gen/frechet", "lower")
    assert (found.outcome, found.found) == ("not measured", "no run has it")
    lacking = [run("lower", seed) for seed in SEEDS]
    assert one(with_runs(*lacking), "lower", "frechet", "lower").outcome == "not measured"


def test_a_number_that_is_not_finite_is_no_measurement() -> None:
    found = one(with_runs(run("lower", 1, frechet=math.nan)), "lower", "frechet", "lower")
    assert found.outcome == "not measured" and "not finite with seed 1" in found.found


@pytest.mark.parametrize(
    ("variant", "words"), [("lower", "diverged with seed 2"), ("none", "the baseline diverged")]
)
def test_nothing_is_claimed_where_a_run_diverged(variant: str, words: str) -> None:
    wild = run(variant, 2, diverged=True, frechet=0.1)
    found = one(with_runs(wild), "lower", "frechet", "lower")
    assert found.outcome == "not seen" and words in found.found


def test_two_seeds_are_too_few_and_say_so() -> None:
    runs_ = [run for run in compared().results if run.seed < 2]
    found = one(make_comparison(runs_), "lower", "frechet", "lower")
    assert found.outcome == "not seen" and found.found.endswith("with 2 seeds: it takes 3 to tell")


def test_an_exact_copy_of_the_baseline_is_not_seen() -> None:
    found = one(compared(), "fast", "frechet", "lower")
    assert found.outcome == "not seen"
    assert found.found == "exactly the baseline's with all 5 seeds"


@pytest.mark.parametrize(
    ("variants", "expected", "lead"),
    [
        (("lower", "fast"), "partly reproduced", "1 reproduced, 1 not seen"),
        (("lower",), "reproduced", "1 reproduced"),
        (("same", "fast"), "not seen", "2 not seen"),
        (("lower", "higher", "same"), "opposite", "1 reproduced, 1 opposite, 1 not seen"),
    ],
)
def test_the_verdict_of_a_finding(variants: tuple[str, ...], expected: str, lead: str) -> None:
    found = judged(compared(), *((variant, "frechet", "lower") for variant in variants))
    assert found.outcome == expected
    assert found.lead.startswith(expected.capitalize()) and found.lead.endswith(f"{lead}.")


def test_what_is_not_measured_keeps_a_finding_from_being_reproduced() -> None:
    found = judged(compared(), ("lower", "frechet", "lower"), ("lower", "gen/frechet", "lower"))
    assert found.outcome == "partly reproduced" and "1 not measured" in found.lead
    assert judged(compared(), ("lower", "gen/frechet", "lower")).outcome == "not measured"


def test_seeds_that_a_variant_lacks_are_told() -> None:
    whole = compared()
    kept = [
        run for run in whole.results if (run.variant, run.seed) not in {("lower", 3), ("same", 4)}
    ]
    made = replace(whole, results=tuple(kept))
    reproduced = one(made, "lower", "frechet", "lower")
    assert reproduced.outcome == "reproduced"
    assert reproduced.found.endswith(", with 4 of 5 seeds")
    assert one(made, "same", "frechet", "lower").found.endswith(", with 4 of 5 seeds")
    assert "of 5 seeds" not in one(made, "higher", "frechet", "lower").found


HOSTILE = "<script>alert(1)</script> | [x](javascript:alert(1)) **{{ 7*7 }}**"


def hostile() -> Comparison:
    expect = {"variant": "lower", "metric": HOSTILE, "change": "lower", "words": HOSTILE}
    asked = Finding.model_validate(
        {"claim": HOSTILE, "source": HOSTILE, "limits": HOSTILE, "expect": [expect]}
    )
    return compared(finding=asked, name=HOSTILE)


def test_every_form_of_a_report_shows_the_finding_on_top_and_escapes_it(tmp_path: Path) -> None:
    made = hostile()
    page = write_report(made, tmp_path).read_text(encoding="utf-8").split(FIRST_SCRIPT)[0]
    assert page.index("Finding:") < page.index('<p class="verdict">')
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report.index("**Finding:**") < report.index("Against the baseline none")
    shown = report.split("```")[0]
    assert "<script" not in shown and shown.count("Limits: ") == 1
    assert r"\](javascript" in shown and not re.search(r"[^\\]\]\(javascript", shown)
    terminal = io.StringIO()
    print_summary(made, Console(width=400, file=terminal))
    printed = terminal.getvalue()
    assert printed.startswith(f"Finding: {HOSTILE}")
    assert printed.index("Not measured here") < printed.index("Against the baseline none")


def test_the_finding_is_kept_and_older_files_are_read(tmp_path: Path) -> None:
    made, path = compared(finding=finding(("lower", "frechet", "lower"))), tmp_path / "c.json"
    made.save(path)
    assert Comparison.load(path) == made
    content = json.loads(path.read_text())
    del content["finding"]
    path.write_text(json.dumps(content))
    assert Comparison.load(path).finding is None


def test_a_file_whose_finding_names_no_variant_is_refused(tmp_path: Path) -> None:
    made, path = compared(finding=finding(("lower", "frechet", "lower"))), tmp_path / "c.json"
    made.save(path)
    path.write_text(
        path.read_text().replace(
            '"variant": "lower",\n    "metric"', '"variant": "x",\n    "metric"'
        )
    )
    with pytest.raises(UserError, match="unknown variant 'x'"):
        Comparison.load(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of three comparisons: one reproduced, one not seen, one that checks no finding."""
    for name, asked in {
        "one": finding(("lower", "frechet", "lower"), claim="The first | claim."),
        "two": finding(("same", "frechet", "higher"), claim="The second."),
        "none": None,
    }.items():
        home = tmp_path / "results" / name
        home.mkdir(parents=True)
        made = compared(name=f"findings/{name}", finding=asked, commit="abc1234", command="do it")
        made.save(home / "comparison.json")
    (tmp_path / "results" / "one" / "report.md").write_text("# one\n")
    return tmp_path / "results"


def test_all_findings_of_a_folder_are_a_table_and_a_page(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "findings.md"
    (folder / LEFT_OUT).write_text("## Left out\n\nA claim.\n")
    result = alignlab("findings", folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert "The first | claim." in result.stdout and "partly" not in result.stdout
    page = out.read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| findings/")]
    assert [line.split(" | ")[-1] for line in table] == ["**reproduced** |", "**not seen** |"]
    assert "The first \\| claim." in table[0] and "\\[" in table[0]
    assert "[Report](../results/one/report.md)" in page and "two/report.md" not in page
    assert "do it (commit abc1234): 100 steps, seeds 0, 1, 2, 3, 4, 25 runs" in page
    assert page.count("What this cannot say: It is small.") == 2
    assert page.endswith("## Left out\n\nA claim.\n")


def test_a_broken_comparison_is_told_by_name_and_no_page_is_written(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "two" / "comparison.json").write_text("{")
    out = tmp_path / "findings.md"
    result = alignlab("findings", folder, "--out", out)
    assert result.exit_code == 1 and not out.exists()
    assert "The first | claim." in result.stdout
    first, second = result.stderr.splitlines()
    assert "two/comparison.json: not a comparison: no JSON" in first and str(out) in second


def test_a_folder_without_findings_is_one_line(tmp_path: Path) -> None:
    assert "no such folder" in refused("findings", tmp_path / "nowhere")
    assert "no comparison in it checks a finding" in refused("findings", tmp_path)


def test_results_that_an_installation_lacks_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "alignlab.experiments.report.findings_page.recipe_folder"
    monkeypatch.setattr(package, lambda: tmp_path / "recipes")
    assert "results/findings: no such folder" in refused("findings")


def test_a_page_whose_last_part_is_no_text_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "push"
    folder.mkdir()
    compared(finding=finding(("lower", "frechet", "lower"))).save(folder / "comparison.json")
    (tmp_path / "left_out.md").write_bytes(b"## \xff")
    found, _ = read_findings(tmp_path)
    with pytest.raises(UserError, match=r"left_out\.md: no text in UTF-8"):
        findings_markdown(found, tmp_path, tmp_path / "page.md")
