"""Draws what the controls show, from a committed comparison; by hand.

    PYTHONPATH=. python -P tests/campaigns/control_figure.py \\
        experiments/results/control_ten_seeds/comparison.json docs/control.png

Left: validation flow loss minus the baseline's with the same seed, by step; lines are means over
seeds, bands run from the lowest to the highest. Right: steps to target of each seed, with the
report's mean and interval.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from alignlab.experiments.charts.look import BASELINE_COLOUR, COLOURS
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.by_step import curves_of
from alignlab.experiments.report.steps_to_target import TARGET, steps_to_target


def draw_curves(axes: Axes, comparison: Comparison, variant: str, colour: str) -> None:
    """Mean and range over seeds of the difference to the baseline, by step."""
    curves = curves_of(comparison, TARGET)
    by_seed = []
    for seed in comparison.seeds:
        base = dict(curves[comparison.baseline, seed])
        by_seed.append({step: v - base[step] for step, v in curves[variant, seed]})
    steps = sorted(by_seed[0])
    values_SN = np.array([[own[step] for step in steps] for own in by_seed])
    axes.fill_between(steps, values_SN.min(0), values_SN.max(0), color=colour, alpha=0.18, lw=0)
    mean_N = values_SN.mean(0)
    axes.plot(steps, mean_N, color=colour, lw=1.8)
    axes.annotate(
        variant, (steps[-1], mean_N[-1]), (5, 0), textcoords="offset points", va="center",
        color=colour, fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def draw_steps(axes: Axes, comparison: Comparison, variant: str, colour: str, place: int) -> None:
    """Steps to target of each seed in percent, and their mean with its interval."""
    steps = steps_to_target(comparison)[variant]
    for number, (seed, ratio) in enumerate(steps.ratios.items()):
        never, height = seed in steps.never, place + 0.14 + 0.022 * number
        axes.plot(100 * ratio, height, ">" if never else "o", ms=4, mfc="none", color=colour)
    assert steps.interval is not None
    assert steps.mean is not None
    low, high = steps.interval
    axes.plot([100 * low, 100 * high], [place, place], color=colour, lw=2.5)
    axes.plot(100 * steps.mean, place, "D", color=colour, ms=6)
    text = f"{variant}: {100 * steps.mean:.1f}% [{100 * low:.1f}%, {100 * high:.1f}%]"
    end = "left" if steps.mean < 0.85 else "right"
    x = 100 * (low if end == "left" else high)
    axes.annotate(
        text, (x, place), (0, -14), textcoords="offset points", color=colour, ha=end,
        fontweight="bold",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparison", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    comparison = Comparison.load(options.comparison)
    others = [variant for variant in comparison.variants if variant != comparison.baseline]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(1, 1.1))
    for axes in (left, right):
        axes.set_facecolor("white")
        axes.tick_params(length=3, color="#9ca3af")
    left.axhline(0, color=BASELINE_COLOUR, lw=1)
    for place, (variant, colour) in enumerate(zip(others, COLOURS[: len(others)], strict=True)):
        draw_curves(left, comparison, variant, colour)
        draw_steps(right, comparison, variant, colour, -place)
    number = len(comparison.seeds)
    last = comparison.results[0].steps
    left.set(xlabel="step", xlim=(0, 1.17 * last), xticks=np.linspace(0, last, 7))
    left.set_title(f"validation flow loss, minus {comparison.baseline}", loc="left", fontsize=10)
    right.axvline(100, color=BASELINE_COLOUR, lw=1)
    right.set(yticks=[], ylim=(-len(others) + 0.55, 0.5), xlabel="% of its steps")
    right.spines["left"].set_visible(False)
    right.set_title(
        f"steps to the last loss of {comparison.baseline}, {number} seeds", loc="left", fontsize=10
    )
    figure.tight_layout(w_pad=3)
    figure.savefig(options.out, dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
