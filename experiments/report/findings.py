"""Whether a published finding came out: its expectations, judged by the claims of the report.

An expectation is reproduced, or its opposite was found, where the report claims a change: where the
interval after Holm's correction excludes 0 and nothing diverged (docs/statistics.md). All else was
not seen, which is no proof that it is not there: what could have been seen is told.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from alignlab.experiments.compare.finding import Expectation, Finding
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.escaping import markdown_text
from alignlab.experiments.report.formatting import format_number
from alignlab.experiments.report.statistics import MIN_PAIRS
from alignlab.experiments.report.summary import SummaryRow

Outcome = Literal["reproduced", "opposite", "not seen", "not measured"]
FindingOutcome = Literal["reproduced", "partly reproduced", "opposite", "not seen", "not measured"]


@dataclass(frozen=True)
class Judged:
    """One expectation and what came out.

    Args:
        expected: from the recipe.
        label: of its metric.
        outcome: see the module.
        found: the difference with its interval, or why there is none; in words.
        num_seeds: that variant and baseline share.
    """

    expected: Expectation
    label: str
    outcome: Outcome
    found: str
    num_seeds: int

    @property
    def expectation(self) -> str:
        """ "refalign: lower cross-subject cosine, block mean ("subjects apart")"."""
        expected = self.expected
        words = f' ("{expected.words}")' if expected.words else ""
        return f"{expected.variant}: {expected.change} {self.label}{words}"

    @property
    def sentence(self) -> str:
        """Expectation, outcome and numbers in one line."""
        return f"{self.expectation}: {self.outcome}, {self.found}"


@dataclass(frozen=True)
class JudgedFinding:
    """A finding and what came out of all that it expects.

    Args:
        finding: from the recipe.
        baseline: that its variants are compared with.
        expectations: in the order of the recipe.
    """

    finding: Finding
    baseline: str
    expectations: tuple[Judged, ...]

    @property
    def outcome(self) -> FindingOutcome:
        """Reproduced if all expectations are, opposite if the opposite of any was found.

        Not measured if none of them was.
        """
        outcomes = {judged.outcome for judged in self.expectations}
        if outcomes in ({"reproduced"}, {"not measured"}):
            return self.expectations[0].outcome
        if "opposite" in outcomes:
            return "opposite"
        return "partly reproduced" if "reproduced" in outcomes else "not seen"

    @property
    def lead(self) -> str:
        """ "Partly reproduced here: of 3 expectations against none, 2 reproduced, 1 not seen."."""
        counts = dict.fromkeys(("reproduced", "opposite", "not seen", "not measured"), 0)
        for judged in self.expectations:
            counts[judged.outcome] += 1
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        number = len(self.expectations)
        return (
            f"{self.outcome.capitalize()} here: of {number} expectation{'s' if number > 1 else ''} "
            f"against {self.baseline}, {told}."
        )


def judge(comparison: Comparison, rows: list[SummaryRow]) -> JudgedFinding | None:
    """What came out of the finding of a comparison; None if it checks none.

    Args:
        comparison: the results.
        rows: `summary_rows` of it.
    """
    finding = comparison.finding
    if finding is None:
        return None
    by_name = {(row.variant, row.metric): row for row in rows}
    judged = (
        _judge(e, comparison.quantity(e.metric).label, by_name.get((e.variant, e.metric)))
        for e in finding.expect
    )
    judged = (_with_seeds(one, len(comparison.seeds)) for one in judged)
    return JudgedFinding(finding, comparison.baseline, tuple(judged))


def finding_lines(judged: JudgedFinding | None) -> Iterator[str]:
    """The finding as plain sentences, for a terminal."""
    if judged is None:
        return
    yield f"Finding: {judged.finding.claim}"
    yield f"Source: {judged.finding.source}"
    yield judged.lead
    yield from (f"- {one.sentence}" for one in judged.expectations)
    yield f"Limits: {judged.finding.limits}"


def finding_markdown(judged: JudgedFinding | None) -> list[str]:
    """The finding as lines of Markdown, for the top of a report."""
    if judged is None:
        return []
    finding = judged.finding
    lines = [f"**Finding:** {markdown_text(finding.claim)}", ""]
    lines += [f"Source: {markdown_text(finding.source)}", ""]
    lines += [f"**{markdown_text(judged.lead)}**", ""]
    lines += [f"- {markdown_text(one.sentence)}" for one in judged.expectations]
    return [*lines, "", f"Limits: {markdown_text(finding.limits)}", ""]


def _judge(expected: Expectation, label: str, row: SummaryRow | None) -> Judged:
    outcome, found = _outcome(expected, row)
    return Judged(expected, label, outcome, found, 0 if row is None else len(row.differences))


def _outcome(expected: Expectation, row: SummaryRow | None) -> tuple[Outcome, str]:
    """What came out, and the numbers or why there are none."""
    if row is None:
        return "not measured", "no run has it"
    if row.change:
        p_text = f", p {row.p_text}" if row.p_text else ""
        is_expected = _is_higher(row) == (expected.change == "higher")
        return "reproduced" if is_expected else "opposite", f"{row.diff_text}{p_text}"
    why = _why_not_measured(row)
    if why:
        return "not measured", why
    return "not seen", _why_not_seen(row)


def _with_seeds(judged: Judged, num_seeds: int) -> Judged:
    """Tells where seeds of the comparison are missing."""
    if judged.outcome == "not measured" or judged.num_seeds == num_seeds:
        return judged
    found = f"{judged.found}, with {judged.num_seeds} of {num_seeds} seeds"
    return dataclasses.replace(judged, found=found)


def _why_not_measured(row: SummaryRow) -> str:
    """Of a row that has no difference to judge, or one that is not finite; else empty."""
    is_known = row.paired is not None or row.ratio is not None
    if is_known or (row.target is not None and row.values):
        return ""
    if row.flag == "not measured":
        return "no run of the variant has it"
    return row.flag or "the baseline lacks it"


def _is_higher(row: SummaryRow) -> bool:
    if row.ratio is not None:
        return row.ratio.value > 1.0
    assert row.paired is not None
    return row.paired.mean > 0.0


def _why_not_seen(row: SummaryRow) -> str:
    """Of a row without a claimed change: its numbers, and what could have been seen."""
    if row.ratio is not None:
        return row.diff_text
    if not row.is_claimable:
        return f"{row.flag or 'the baseline diverged'}: nothing is claimed"
    if row.target is not None and row.target.interval is None:
        return f"cannot tell: {row.target.why_unknown}"
    paired = row.paired
    assert paired is not None
    if paired.is_equal:
        return f"exactly the baseline's with all {paired.num_pairs} seeds"
    if paired.num_pairs < MIN_PAIRS:
        count = f"{paired.num_pairs} seed{'s' if paired.num_pairs > 1 else ''}"
        return f"{row.diff_text} with {count}: it takes {MIN_PAIRS} to tell"
    if paired.low is None:
        return f"{row.diff_text} with every seed: no spread to judge it by"
    more = ""
    if row.target is not None:  # its statistics are of logarithms
        more = row.target.never_words
    elif paired.detectable is not None:
        more = f"could have seen {format_number(paired.detectable)}"
    return ", ".join(part for part in (row.diff_text, more) if part)
