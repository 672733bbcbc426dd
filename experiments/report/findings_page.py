"""All findings of a folder: read from its comparisons, and written as one page of Markdown."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from alignlab.config.recipe_file import recipe_folder
from alignlab.errors import UserError, first_line
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.escaping import markdown_text
from alignlab.experiments.report.findings import JudgedFinding, judge
from alignlab.experiments.report.summary import summary_rows

LEFT_OUT = "left_out.md"
"""In a folder of findings: its page ends with it. Markdown of the folder's own author."""


@dataclass(frozen=True)
class FoundFinding:
    """A comparison that checks a finding, and what came out.

    Args:
        file: its comparison.json.
        comparison: what that holds.
        judged: the finding.
    """

    file: Path
    comparison: Comparison
    judged: JudgedFinding

    @property
    def steps(self) -> str:
        """Steps of the runs: "200", or all numbers that there are."""
        return ", ".join(f"{n:,}" for n in sorted({run.steps for run in self.comparison.results}))

    @property
    def came_out(self) -> list[str]:
        """A sentence per expectation."""
        return [one.sentence for one in self.judged.expectations]


def committed_findings() -> Path:
    """Where the results that come with alignlab lie; an installation may have none."""
    return recipe_folder().with_name("results") / "findings"


def read_findings(folder: Path) -> tuple[list[FoundFinding], list[str]]:
    """All comparisons below a folder that check a finding, by path.

    Returns:
        They, and a line for each comparison.json that cannot be read.

    Raises:
        UserError: no such folder, or nothing in it checks a finding.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; `alignlab compare findings/NAME` makes one in runs/findings"
        )
    found, broken = [], []
    for file in sorted(folder.rglob("comparison.json")):
        try:
            comparison = Comparison.load(file)
        except UserError as error:
            broken.append(str(error))
            continue
        judged = judge(comparison, summary_rows(comparison))
        if judged is not None:
            found.append(FoundFinding(file, comparison, judged))
    if not found and not broken:
        raise UserError(f"{folder}: no comparison in it checks a finding (recipe key `finding`)")
    return found, broken


def findings_markdown(found: Sequence[FoundFinding], folder: Path, out: Path) -> str:
    """The page of all findings: a table, then each by itself, then what was left out.

    Args:
        found: of the folder.
        folder: that they were read from.
        out: the page's own path, from which links lead.
    """
    lines = [
        *("# Published findings, checked here", ""),
        "Each is a comparison of alignlab's own (`alignlab compare findings/NAME`), and judged by",
        "the claims of its report: reproduced where the interval of the difference, after Holm's",
        "correction over the variants, excludes 0 on the claim's side; opposite where it does on",
        "the other; else not seen, with the difference that would have been found in 4 of 5 such",
        "comparisons. Not seen is no refutation. Expectations are corrected neither for each other",
        "nor over the findings. `alignlab findings --out FILE.md` writes this page.",
        *("", "| finding | claim | source | came out | verdict |", "|---|---|---|---|---|"),
    ]
    for one in found:
        finding = one.judged.finding
        cells = [one.comparison.name, finding.claim, finding.source]
        came_out = "<br>".join(map(markdown_text, one.came_out))
        shown = [*map(markdown_text, cells), came_out, f"**{one.judged.outcome}**"]
        lines.append(f"| {' | '.join(shown)} |")
    for one in found:
        lines += _section(one, out)
    left_out = folder / LEFT_OUT
    if left_out.is_file():
        try:
            lines += ["", left_out.read_text(encoding="utf-8").rstrip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{left_out}: no text in UTF-8: {first_line(error)}") from None
    return "\n".join([*lines, ""])


def _section(one: FoundFinding, out: Path) -> list[str]:
    comparison, finding = one.comparison, one.judged.finding
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    facts = {
        "Claim": finding.claim,
        "Source": finding.source,
        "What this cannot say": finding.limits,
        "Made by": f"{comparison.command} (commit {comparison.commit or 'not known'}): "
        f"{one.steps or 'no'} steps, seeds {seeds}, {len(comparison.results)} runs",
    }
    lines = ["", f"## {markdown_text(comparison.name)}", ""]
    lines += [f"**{markdown_text(one.judged.lead)}**", ""]
    lines += [f"- {markdown_text(sentence)}" for sentence in one.came_out]
    lines += ["", *(f"- {name}: {markdown_text(text)}" for name, text in facts.items())]
    report = one.file.with_name("report.md")
    if report.is_file():
        way = os.path.relpath(report, out.absolute().parent).replace(os.sep, "/")
        lines.append(f"- [Report]({quote(way)})")
    return lines
