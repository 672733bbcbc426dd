"""A few sentences that say what the numbers show, and no more."""

import math

from alignlab.experiments.result import Comparison
from alignlab.experiments.summary import SummaryRow, by_metric, joined

_NUM_METRICS = 2


def verdict(comparison: Comparison, rows: list[SummaryRow]) -> list[str]:
    """Name the best variant on the first two headline metrics, and how far that goes.

    Gives mean paired difference, spread and in how many seeds the sign holds; draws no conclusion
    about significance.
    """
    if len(comparison.variants) < 2:
        return [f"Only the baseline {comparison.baseline} is here: there is nothing to compare."]
    judged = [
        group
        for group in by_metric(rows)
        if group[0].headline and not group[0].quantity.cost and group[0].quantity.better != "none"
    ]
    if not judged:
        return ["No headline metric with a better side was measured."]
    sentences = [_sentence(comparison, group) for group in judged[:_NUM_METRICS]]
    return [*sentences, _caveat(comparison)]


def _sentence(comparison: Comparison, group: list[SummaryRow]) -> str:
    known, baseline = group[0].quantity, comparison.baseline
    on = f"On {known.label} ({known.better} is better)"
    sign = -1.0 if known.better == "lower" else 1.0
    gains = [
        (sign * row.diff_mean, row)
        for row in group
        if row.diff_mean is not None and math.isfinite(row.diff_mean)
    ]
    if not gains:
        return f"{on} no variant can be compared with the baseline ({baseline})."
    gain, best = max(gains, key=lambda pair: pair[0])
    found, num_pairs = joined(best.diff_text), len(best.differences)
    seeds = (
        f"better in {best.num_better} of {num_pairs} seeds" if num_pairs > 1 else "with one seed"
    )
    if gain <= 0.0:
        return (
            f"{on} no variant's mean is better than the baseline's ({baseline}); the closest is "
            f"{best.variant}: {found}, {seeds}."
        )
    if best.num_better == num_pairs:
        return f"{on} {best.variant} does best: {found} against the baseline ({baseline}), {seeds}."
    return (
        f"{on} {best.variant} has the best mean, {found} against the baseline ({baseline}), but "
        f"the seeds disagree: {seeds}."
    )


def _caveat(comparison: Comparison) -> str:
    if len(comparison.seeds) == 1:
        return "One seed cannot tell a variant's effect from that seed's luck."
    return (
        f"Numbers are mean ± standard deviation of paired differences over "
        f"{len(comparison.seeds)} seeds: a description, not a significance test."
    )
