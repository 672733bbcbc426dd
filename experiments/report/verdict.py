"""What the numbers allow one to say, in words: no claim without its interval."""

import math
from dataclasses import dataclass, field

from alignlab.experiments.compare.result import Comparison, Ratio
from alignlab.experiments.report.formatting import format_interval, format_number
from alignlab.experiments.report.matrix import kind_of
from alignlab.experiments.report.run_warnings import diverged_seeds
from alignlab.experiments.report.statistics import ALPHA, BOOTSTRAP_PAIRS, MIN_PAIRS
from alignlab.experiments.report.steps_to_target import StepsToTarget
from alignlab.experiments.report.summary import SummaryRow, by_metric, ratio_text


@dataclass(frozen=True)
class Verdict:
    """The first thing that a reader sees.

    Args:
        lead: one sentence about all variants.
        variants: a sentence per variant, by name, which it starts with; empty when there can be
            no verdict.
        reading: how the claims were reached.
        short: the claims alone of each of `variants`, and of how many metrics there is none.
    """

    lead: str
    variants: dict[str, str]
    reading: str
    short: dict[str, str] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """All of it, in order."""
        return [text for text in (self.lead, *self.variants.values(), self.reading) if text]


def verdict(comparison: Comparison, rows: list[SummaryRow]) -> Verdict:
    """Says for every variant which headline quantities it changes, and what could not be seen.

    Quantities are those of the summary table that have a better side, and the step time. A change
    is claimed where `Paired.is_claimed`. Of a variant that diverged nothing else is said, and if
    the baseline did, nothing at all.
    """
    others = [variant for variant in comparison.variants if variant != comparison.baseline]
    diverged = {v: seeds for v in comparison.variants if (seeds := diverged_seeds(comparison, v))}
    told = "".join(f" {_diverged(diverged, variant)}." for variant in diverged)
    if not others:
        lead = f"Only the baseline {comparison.baseline} is here: there is nothing to compare."
        return Verdict(lead + told, {}, "")
    groups = [group for group in by_metric(rows) if _has_verdict(group[0])]
    if all(group[0].quantity.cost for group in groups):
        return Verdict(f"No headline metric with a better side was measured.{told}", {}, "")
    num_seeds = len(comparison.seeds)
    if num_seeds < MIN_PAIRS:
        count = "One seed" if num_seeds == 1 else f"{num_seeds} seeds"
        lead = f"{count}: no verdict. It takes {MIN_PAIRS} seeds to tell an effect from luck."
        return Verdict(lead + told, {}, "")
    by_variant = {v: [row for group in groups for row in group if row.variant == v] for v in others}
    base = {group[0].metric: row for group in groups for row in group if row.is_baseline}
    if comparison.baseline in diverged:
        return Verdict(f"No verdict: the baseline diverged.{told}", {}, "")
    sound = {v: rows for v, rows in by_variant.items() if v not in diverged}
    sentences = {v: _sentence(v, rows, base) for v, rows in sound.items()}
    lost = {v: f"{_diverged(diverged, v)}: nothing is claimed of it." for v in diverged}
    sentences |= lost
    short = {v: _short(v, rows, base) for v, rows in sound.items()} | lost
    return Verdict(
        _lead(comparison, sound, list(diverged)),
        {variant: sentences[variant] for variant in others},
        _reading(comparison, sound, _num_tests(groups)) if sound else "",
        {variant: short[variant] for variant in others},
    )


def _diverged(diverged: dict[str, list[int]], variant: str) -> str:
    seeds = diverged[variant]
    which = f"seed{'s' if len(seeds) > 1 else ''} {_listed([str(seed) for seed in seeds], 'and')}"
    return f"{variant} DIVERGED with {which} (its validation loss ended far above its start)"


def _has_verdict(row: SummaryRow) -> bool:
    meaning = row.quantity
    return row.headline and meaning.better != "none" and (meaning.slower or not meaning.cost)


def _lead(
    comparison: Comparison, by_variant: dict[str, list[SummaryRow]], diverged: list[str]
) -> str:
    against = f"Against the baseline {comparison.baseline}, over {len(comparison.seeds)} seeds"
    if comparison.budget is not None:
        against += f" at {comparison.budget.label}"
    parts = []
    for change in ("better", "worse"):
        names = [
            variant
            for variant, rows in by_variant.items()
            if any(row.change == change and not row.quantity.cost for row in rows)
        ]
        if names:
            parts.append(f"{change} on something: {', '.join(names)}")
    if by_variant and not parts:
        parts.append("no change of quality can be told from chance")
    if diverged:
        parts.append(f"DIVERGED: {', '.join(diverged)}")
    return f"{against}: {'; '.join(parts)}."


def _sentence(variant: str, rows: list[SummaryRow], base: dict[str, SummaryRow]) -> str:
    """ "refalign (5 seeds): raises subject retrieval by 0.12 [0.07, 0.16] (better); no ..."."""
    clauses = [_claim(row, base[row.metric]) for row in rows if row.change]
    unchanged = [row for row in rows if not row.change]
    equal = [_name(row) for row in unchanged if row.paired is not None and row.paired.is_equal]
    if equal:
        clauses.append(f"exactly the baseline's {_listed(equal, 'and')}")
    undetected = [
        f"{_name(row)} (could have seen {_detectable(row, base[row.metric])})"
        for row in unchanged
        if row.paired is not None and row.paired.detectable is not None
    ]
    undetected += [f"{_name(row)} ({row.diff_text})" for row in unchanged if row.ratio is not None]
    undetected += [
        f"{_name(row)} ({', '.join(filter(None, (row.diff_text, row.target.never_words)))})"
        for row in unchanged
        if row.target is not None and row.target.is_undetected
    ]
    if undetected:
        clauses.append(f"no detectable change in {_listed(undetected, 'or')}")
    unknown = [f"{_name(row)} ({why})" for row in unchanged if (why := _why_unknown(row))]
    if unknown:
        clauses.append(f"cannot tell for {_listed(unknown, 'and')}")
    num_seeds = max(len(row.differences) for row in rows)
    return f"{variant} ({num_seeds} seeds): {'; '.join(clauses)}."


def _short(variant: str, rows: list[SummaryRow], base: dict[str, SummaryRow]) -> str:
    """ "refalign: raises subject retrieval by 0.12 [0.07, 0.16] (better); 4 more metrics ..."."""
    parts = [_claim(row, base[row.metric], has_share=True) for row in rows if row.change]
    unchanged = [row for row in rows if not row.change]
    unknown = [row for row in unchanged if kind_of(row) == "no verdict"]
    for words, group in (
        ("not told apart from the baseline", [row for row in unchanged if row not in unknown]),
        ("without a verdict", unknown),
    ):
        if len(group) == 1:
            parts.append(f"{_name(group[0])} {words}")
        elif group:
            parts.append(f"{len(group)} {'more ' if parts else ''}metrics {words}")
    return f"{variant}: {'; '.join(parts)}."


def _claim(row: SummaryRow, base: SummaryRow, *, has_share: bool = False) -> str:
    """What is claimed of a row, if asked with its share of the baseline's number."""
    if row.ratio is not None:
        return _claim_time(row.ratio)
    if row.target is not None:
        return _claim_target(row.target, base.variant, row.change)
    paired = row.paired
    assert paired is not None and paired.low is not None and paired.high is not None
    factor, unit = _scale(row, base)
    factor = math.copysign(factor, paired.mean)
    low, high = sorted((paired.low * factor, paired.high * factor))
    size = format_interval(paired.mean * factor, low, high, unit=unit)
    if row.quantity.slower:
        return f"{size} {'slower' if paired.mean > 0 else 'faster'}"
    share = ""
    if has_share and base.mean is not None and base.mean > 0.0:
        share = f", {100.0 * abs(paired.mean) / base.mean:.2g}%"
    verb = "raises" if paired.mean > 0 else "lowers"
    return f"{verb} {_name(row)} by {size} ({row.change}{share})"


def _claim_target(steps: StepsToTarget, baseline: str, change: str) -> str:
    """ "gets to none's last validation flow loss in 71% [62%, 81%] of its steps (better)"."""
    assert steps.mean is not None and steps.interval is not None
    low, high = steps.interval
    size = format_interval(100.0 * steps.mean, 100.0 * low, 100.0 * high, unit="%")
    never = f", {steps.never_words}" if steps.never else ""
    return (
        f"gets to {baseline}'s last validation flow loss in {size} of its steps ({change}{never})"
    )


def _claim_time(ratio: Ratio) -> str:
    assert ratio.low is not None and ratio.high is not None
    if ratio.value > 1.0:
        return f"{ratio_text(ratio)} slower"
    faster = Ratio(2.0 - ratio.value, 2.0 - ratio.high, 2.0 - ratio.low, ratio.beyond)
    return f"{ratio_text(faster)} faster"


def _detectable(row: SummaryRow, base: SummaryRow) -> str:
    factor, unit = _scale(row, base)
    assert row.paired is not None and row.paired.detectable is not None
    value = row.paired.detectable * factor
    if not math.isfinite(value):
        return "nothing"
    return (f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.2g}") + unit


def _scale(row: SummaryRow, base: SummaryRow) -> tuple[float, str]:
    """Factor and unit in which a quantity is told: times in percent of the baseline's."""
    assert base.mean is not None  # or there would be no differences
    if not row.quantity.slower:
        return 1.0, ""
    factor = 100.0 / base.mean if base.mean else math.inf
    return (factor, "%") if math.isfinite(factor) else (1.0, " s")


def _why_unknown(row: SummaryRow) -> str:
    paired = row.paired
    if row.ratio is not None:
        return ""
    if row.target is not None:
        return row.target.why_unknown if row.values else row.flag
    if paired is None:
        return row.flag or "the baseline lacks it"
    if paired.num_pairs < MIN_PAIRS:
        return f"{paired.num_pairs} of {row.num_seeds} seeds have it"
    if paired.low is None:
        mean = format_number(paired.mean, sign=True)
        return f"{mean} with every seed: no spread to judge it by"
    return ""


def _name(row: SummaryRow) -> str:
    label = row.quantity.label.removesuffix(", block mean").removesuffix(" (s)")
    return label.removesuffix(", interleaved")


def _listed(parts: list[str], word: str) -> str:
    return f" {word} ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _num_tests(groups: list[list[SummaryRow]]) -> int:
    """Most variants that Holm's correction of a metric is over, those that diverged included."""
    return max(
        sum(row.paired is not None and row.paired.holm_p is not None for row in group)
        for group in groups
    )


def _reading(comparison: Comparison, by_variant: dict[str, list[SummaryRow]], tests: int) -> str:
    methods = {row.paired.method for rows in by_variant.values() for row in rows if row.paired}
    how = "BCa bootstrap and sign-flip test" if "bootstrap" in methods else "Student's t"
    if "t" in methods and len(comparison.seeds) < BOOTSTRAP_PAIRS:
        how += f" (a bootstrap of fewer than {BOOTSTRAP_PAIRS} seeds is too narrow)"
    interleaved = ""
    if any(row.ratio is not None for rows in by_variant.values() for row in rows):
        interleaved = " Step times are not over seeds: see the note on the cost of a step."
    if any(row.target is not None for rows in by_variant.values() for row in rows):
        interleaved += " Steps to target: Student's t of log ratios, see their note."
    level = "95% intervals"
    if tests > 1:
        level = f"intervals, at the level of Holm's correction over {tests} variants (95% or more),"
    return (
        f"Numbers in brackets are {level} of the difference with the same seed: {how}. A change is "
        "claimed where its interval excludes 0, each quantity by itself; the "
        f"{'corrected ' if tests > 1 else ''}p-value is then at most {ALPHA}. What could have been "
        "seen: the true change that would be found in 4 of 5 comparisons with these seeds and this "
        f"spread.{interleaved}"
    )
