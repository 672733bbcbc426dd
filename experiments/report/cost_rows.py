"""The measured cost of a step as rows of a report, and what a reader must know of it."""

from alignlab.experiments.compare.result import Comparison, Ratio
from alignlab.experiments.report.metric_table import quantity
from alignlab.experiments.report.summary_row import SummaryRow


def cost_groups(comparison: Comparison) -> dict[str, list[SummaryRow]]:
    """Rows of what was measured of a step of each variant, by metric."""
    if comparison.cost is None:
        return {}
    costs = comparison.cost.variants
    base = costs[comparison.baseline]
    found: dict[str, dict[str, tuple[float, Ratio]]] = {
        "cost/step": {v: (cost.seconds, cost.slower) for v, cost in costs.items()},
        "cost/gflop": {
            v: (cost.flops / 1e9, Ratio(cost.flops / base.flops)) for v, cost in costs.items()
        },
    }
    if base.memory_mib is not None:
        found["cost/memory_mib"] = {
            v: (cost.memory_mib, Ratio(cost.memory_mib / base.memory_mib))
            for v, cost in costs.items()
            if cost.memory_mib is not None
        }
    return {
        metric: [_cost_row(comparison, metric, v, *values[v]) for v in comparison.variants]
        for metric, values in found.items()
    }


def _cost_row(
    comparison: Comparison, metric: str, variant: str, mean: float, ratio: Ratio
) -> SummaryRow:
    return SummaryRow(
        metric=metric,
        quantity=quantity(metric),
        headline=quantity(metric).headline,
        variant=variant,
        is_baseline=variant == comparison.baseline,
        num_seeds=len(comparison.seeds),
        num_runs=sum(run.variant == variant for run in comparison.results),
        values={},
        mean=mean,
        std=None,
        differences={},
        paired=None,
        num_better=None,
        ratio=ratio,
    )


def cost_notes(comparison: Comparison, rows: list[SummaryRow]) -> list[str]:
    cost = comparison.cost
    if cost is None:
        if any(row.metric == "time/step" and row.headline and row.values for row in rows):
            return [
                "Step times are of runs made one after another: they depend on their order and on "
                "what else the machine did. `cost: {rounds: 10}` measures them interleaved."
            ]
        return []
    text = (
        f"Cost of a step: variant and baseline took turns in one process, {cost.rounds} rounds on "
        f"{cost.device}, with every objective on. Change of step time: median of the ratios of a "
        "round; brackets: interval of that median from order statistics, at least 95%; seconds: "
        "the baseline's median times that ratio. Two copies of the baseline differed by up to "
        f"{100.0 * cost.beyond:.2g}%, and no smaller change is claimed. FLOPs: matrix products, "
        "convolutions and attention, teachers included."
    )
    if cost.unknown:
        text += f" Not in the FLOPs, for want of a formula: {', '.join(cost.unknown)}."
    return [text]
