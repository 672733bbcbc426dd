"""How the best of each variant's sweep came about: its metric against the trial."""

import itertools

from alignlab.experiments.charts.chart import Chart
from alignlab.experiments.charts.lines import Line, line_figure
from alignlab.experiments.compare.result import TUNED_DIRECTION, Comparison
from alignlab.experiments.report.charts import variant_numbers, variant_styles
from alignlab.experiments.report.tuning import tuned_metric, tuning_history


def tuning_charts(comparison: Comparison) -> list[Chart]:
    """The best so far of each variant against the trial, a chart for each metric."""
    lines: dict[str, list[Line]] = {}
    styles, words = variant_styles(comparison), {}
    for variant in comparison.variants:
        history = tuning_history(comparison, variant)
        if not history:
            continue
        metric = tuned_metric(comparison, variant)
        is_maximized = comparison.tuning[TUNED_DIRECTION].get(variant) == "maximize"
        words[metric] = "higher is better" if is_maximized else "lower is better"
        trials = [trial for trial, _ in history]
        values = (value for _, value in history)
        best = list(itertools.accumulate(values, max if is_maximized else min))
        line = Line(styles[variant], [float(trial) for trial in trials], best, best, best)
        lines.setdefault(metric, []).append(line)
    charts = []
    for metric, of_metric in lines.items():
        figure, readouts = line_figure(
            of_metric, variant_numbers(comparison), "trial", markers=True
        )
        label = comparison.quantity(metric).label if metric else "metric"
        caption = f"the best trial so far, on the seeds of the sweeps; {words[metric]}"
        charts.append(Chart(f"Tuning: {label}", caption, figure, readouts))
    return charts
