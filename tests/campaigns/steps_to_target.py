"""How often the interval of steps to target is wrong, counted where the truth is known; by hand.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -P tests/campaigns/steps_to_target.py numbers
    PYTHONPATH=. OMP_NUM_THREADS=1 python -P tests/campaigns/steps_to_target.py curves
    PYTHONPATH=. OMP_NUM_THREADS=1 python -P tests/campaigns/steps_to_target.py rules
    PYTHONPATH=. OMP_NUM_THREADS=1 python -P tests/campaigns/steps_to_target.py families

`--repeats` (1000) comparisons of one variant a row. `numbers` draws log-normal ratios of which
those above a bound are not seen. `curves` draws validation losses of a baseline and of a variant
that takes `ratio` of its steps to any loss, and measures them as a report does. The expected loss
falls as 0.35 + 0.14 (step / 500)^-0.85: 0.49, 0.43, 0.41, 0.39 at 500, 1000, 1500, 2000 steps. Of
each run differ: its level, a drift (an AR(1) process whose correlation over 100 steps is 0.9),
and a wiggle of its own at every evaluation. `rules` compares, on copies of the baseline under
other noise, what counts where a curve crosses the target several times, and `families` counts
comparisons with any false claim among four such copies, after Holm's correction.

A row says: share of seeds that never reach the target; of comparisons without an interval (fewer
than three seeds reach it); of the intervals, how many hold the truth, lie above it ("later") and
lie below it ("sooner"). At ratio 1 the last two are false claims.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from alignlab.experiments.compare.result import Curve
from alignlab.experiments.report.censored import CensoredSample
from alignlab.experiments.report.statistics import ALPHA, MIN_PAIRS, holm
from alignlab.experiments.report.steps_to_target import crossing
from noisy_curves import Logs, Noise, Rule, logs_against, logs_of_curves, loss_curve


def first_crossing(curve: Curve, target: float) -> float | None:
    """The first crossing, whatever follows."""
    for place, (_, value) in enumerate(curve):
        if value <= target:
            return crossing(curve[: place + 1], target)
    return None


def last_crossing(curve: Curve, target: float) -> float | None:
    """The crossing after which the curve stays below the target."""
    above = [place for place, (_, value) in enumerate(curve) if value > target]
    return crossing(curve[above[-1] if above else 0 :], target)


def logs_of_numbers(rng: np.random.Generator, num_seeds: int, share: float) -> Logs:
    """Log ratios of mean 0 and standard deviation 1, of which this share is not seen."""
    bound = float(stats.norm.isf(share)) if share else math.inf
    drawn = rng.standard_normal(num_seeds).tolist()
    return [x for x in drawn if x <= bound], [bound for x in drawn if x > bound]


def count(name: str, comparisons: Iterator[Logs], truth: float) -> None:
    """Prints one row."""
    total = unseen = seeds = without = later = sooner = 0
    for known, bounds in comparisons:
        total += 1
        unseen += len(bounds)
        seeds += len(known) + len(bounds)
        if len(known) < MIN_PAIRS or np.ptp(known) == 0.0:
            without += 1
            continue
        sample = CensoredSample(np.asarray(known), np.asarray(bounds))
        t = sample.t(truth)
        if abs(t) > stats.t.isf(ALPHA / 2, sample.size - 1):
            later += t > 0
            sooner += t < 0
    shown = total - without
    print(
        f"{name:48s} | never {unseen / seeds:4.0%} | no interval {without / total:4.0%} | "
        f"holds {1 - (later + sooner) / shown:.1%} | later {later / shown:.1%} | "
        f"sooner {sooner / shown:.1%}",
        flush=True,
    )


NOISES = {
    "drift": Noise(0.003, 0.001, 0.001, 100),
    "drift, every 500 steps": Noise(0.003, 0.001, 0.001, 500),
    "wiggle": Noise(0.001, 0.003, 0.003, 100),
    "variant wiggles more": Noise(0.002, 0.004, 0.002, 100),
}


def numbers(repeats: int) -> None:
    """The plain log-normal model."""
    for num_seeds in (5, 10):
        for share in (0.0, 0.2, 0.4):
            rng = np.random.default_rng(0)
            drawn = (logs_of_numbers(rng, num_seeds, share) for _ in range(repeats))
            count(f"{num_seeds} seeds, log-normal, {share:.0%} not seen", drawn, 0.0)


def curves(repeats: int) -> None:
    """Curves, with the report's own rule."""
    for num_seeds in (5, 10):
        for name, noise in NOISES.items():
            for ratio in (0.7, 0.92, 0.97, 1.0):
                rng = np.random.default_rng(0)
                drawn = (logs_of_curves(rng, num_seeds, noise, ratio) for _ in range(repeats))
                count(f"{num_seeds} seeds, {name}, ratio {ratio}", drawn, math.log(ratio))


def rules(repeats: int) -> None:
    """Copies of the baseline under other noise, by what counts as reaching the target."""
    chosen: dict[str, tuple[Rule, bool]] = {
        "middle": (crossing, False),
        "last": (last_crossing, False),
        "first": (first_crossing, False),
        "first of both": (first_crossing, True),
    }
    for num_seeds in (5, 10):
        for name in list(NOISES)[2:]:
            for rule, (function, both) in chosen.items():
                rng = np.random.default_rng(0)
                drawn = (
                    logs_of_curves(rng, num_seeds, NOISES[name], 1.0, function, first_of_both=both)
                    for _ in range(repeats)
                )
                count(f"{num_seeds} seeds, {name}, {rule}", drawn, 0.0)


def families(repeats: int) -> None:
    """Four copies of the baseline in one comparison: how often any of them is claimed to differ."""
    for num_seeds in (5, 10):
        for name, noise in NOISES.items():
            rng, claimed = np.random.default_rng(0), 0
            for _ in range(repeats):
                bases = [loss_curve(rng, noise, noise.base_wiggle, 1.0) for _ in range(num_seeds)]
                drawn = [logs_against(rng, bases, noise, 1.0) for _ in range(4)]
                p_values = [
                    CensoredSample(np.asarray(known), np.asarray(bounds)).p_value()
                    for known, bounds in drawn
                    if len(known) >= MIN_PAIRS
                ]
                claimed += any(p <= ALPHA for p in holm(p_values))
            print(f"{num_seeds} seeds, {name}, 4 copies: {claimed / repeats:.1%}", flush=True)


MODES = {"numbers": numbers, "curves": curves, "rules": rules, "families": families}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=tuple(MODES))
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args()
    MODES[options.what](options.repeats)


if __name__ == "__main__":
    main()
