"""How far two equal trainings differ: the baseline against its second training (`aa: true`).

They have the same recipe and the same seed. On a CPU with as many threads they end with the same
bits; on a GPU, where sums are taken in any order, they do not, and what they differ by is in every
difference between variants too. Costs are left out: how equal models differ in time is measured
with the cost of a step (`experiments/compare/cost.py`).

Warnings tell a second training that diverged; a mean difference whose interval excludes 0, since
the two trainings were then not equal; and a claimed change that is smaller than what one seed
differed by. The intervals of the summary table's metrics are at the level of Holm's correction over
these metrics, so that of equal trainings at most 5% of comparisons are warned of. Steps to target
are a test of their own, of numbers that the validation loss is warned of already: left out there.
"""

import csv
import io
import math
from dataclasses import dataclass, field, replace

from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.report.escaping import csv_cell
from alignlab.experiments.report.formatting import DASH
from alignlab.experiments.report.metric_table import STEPS_TO_TARGET, Quantity
from alignlab.experiments.report.statistics import Paired, paired_statistics
from alignlab.experiments.report.steps_to_target import TARGET, StepsToTarget, steps_to_target
from alignlab.experiments.report.summary import SummaryRow, by_metric, difference_text, place_of

READING = (
    "Second training minus first, with the same recipe and seed: the largest magnitude over seeds; "
    "their mean with its interval, at the level of Holm's correction over these metrics (95% or "
    "more), but for steps to target, which have a 95% interval and whose largest difference is a "
    "lower bound where a seed never gets there; with how many seeds both are exactly equal. Beside "
    "it, the smallest difference that could have been seen of a variant, and the claimed ones."
)
HEADER = ("metric", "largest", "mean [interval]", "equal with", "could see", "claimed")
"""Columns of `NoiseFloor.table`."""


@dataclass(frozen=True)
class FloorRow:
    """How far the two trainings differ in one metric.

    Args:
        metric: flat name.
        quantity: its meaning.
        differences: second training minus first by seed; of steps to target, the ratio less 1.
        num_equal: seeds with which both have the same number.
        scale: largest magnitude of what was subtracted.
        paired: statistics of the differences, of steps to target of the ratios' logarithms; None
            outside the summary table, and where a difference is not finite.
        target: the steps to target of the second training.
        detectable: smallest true difference that could have been seen of any variant; see `Paired`.
        claimed: size of the claimed change of each variant that has one.
    """

    metric: str
    quantity: Quantity
    differences: dict[int, float]
    num_equal: int
    scale: float = 1.0
    paired: Paired | None = None
    target: StepsToTarget | None = None
    detectable: float | None = None
    claimed: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As sentences name it."""
        return self.quantity.label.removesuffix(", block mean")

    @property
    def is_equal(self) -> bool:
        """Whether all seeds are."""
        return self.num_equal == len(self.differences)

    @property
    def largest(self) -> float:
        """Magnitude of the largest difference; infinite where one is not finite."""
        sizes = [abs(value) for value in self.differences.values()]
        return max(sizes) if all(map(math.isfinite, sizes)) else math.inf

    @property
    def texts(self) -> tuple[str, ...]:
        """Its cells below `HEADER`."""
        mean = DASH if self.paired is None else difference_text(self.paired)
        if self.target is not None:
            mean = self.target.change_text
        claimed = [f"{self.size(size)} ({v})" for v, size in self.claimed.items()]
        return (
            self.quantity.label,
            self.largest_text,
            mean,
            f"{self.num_equal}/{len(self.differences)}",
            "" if self.detectable is None else self.size(self.detectable),
            ", ".join(claimed),
        )

    @property
    def largest_text(self) -> str:
        """ "0.0021"; of steps to target "12%, never in 1/3"."""
        never = "" if self.target is None else self.target.never_text
        return ", ".join(filter(None, (self.size(self.largest), never)))

    def size(self, value: float) -> str:
        """A magnitude as shown: two digits, or three and more before the point."""
        value, unit = (value, "") if self.target is None else (100.0 * value, "%")
        if not math.isfinite(value):
            return "not finite"
        return (f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.2g}") + unit


@dataclass(frozen=True)
class NoiseFloor:
    """What the second training says.

    Args:
        baseline: its name.
        seeds: those with which both trainings finished.
        missing: seeds of the comparison with which they did not.
        diverged: seeds with which the second one did.
        rows: every metric that is no cost, those of the summary table first.
    """

    baseline: str
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    diverged: tuple[int, ...]
    rows: tuple[FloorRow, ...]

    @property
    def shown(self) -> list[FloorRow]:
        """The metrics of the summary table."""
        return [row for row in self.rows if row.quantity.headline]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Their texts, below `HEADER`."""
        return [row.texts for row in self.shown]

    @property
    def sentence(self) -> str:
        """The first thing that a reader sees of it."""
        twice, missing = f"Noise floor: {self.baseline} trained twice", ""
        if self.missing:
            missing = f" With {_seeds(self.missing)} there are not both trainings."
        differing = [row for row in self.rows if not row.is_equal]
        if not self.rows:
            return f"{twice}: nothing was measured in both trainings.{missing}"
        if not differing:
            return f"{twice} ends with the same numbers with {self._which()}.{missing}"
        unequal = [row for row in self.shown if not row.is_equal]
        parts = [f"{r.largest_text} in {r.name}{_seen(r)}" for r in unequal if r.largest < math.inf]
        parts += [
            f"a number that is not finite in {r.name}" for r in unequal if r.largest == math.inf
        ]
        if not parts:
            return (
                f"{twice} with {self._which()} differs in {len(differing)} of {len(self.rows)} "
                f"numbers, none of them in the summary table (noise_floor.csv).{missing}"
            )
        equal = [row.name for row in self.shown if row.is_equal]
        same = f"; not at all in {', '.join(equal)}" if equal else ""
        return f"{twice} with {self._which()} differs by up to {', '.join(parts)}{same}.{missing}"

    @property
    def warnings(self) -> list[str]:
        """What must not be overlooked, a sentence each."""
        found = []
        if self.diverged:
            found.append(
                f"{self.baseline} trained a second time DIVERGED with {_seeds(self.diverged)} (its "
                "validation loss ended far above its start)."
            )
        tested = [row for row in self.shown if row.target is None and row.paired is not None]
        differing = [row for row in tested if row.paired is not None and row.paired.is_claimed]
        if differing and not self.diverged:
            listed = ", ".join(f"{row.name} {row.texts[2]}" for row in differing)
            found.append(
                f"{self.baseline} trained twice differs by more than chance: {listed}. Something "
                "else than noise differs between its two trainings (see their environment.json), "
                "and may differ between variants."
            )
        small = [
            f"{row.name} of {variant} ({row.size(size)}; {self.baseline} trained twice: "
            f"{row.size(row.largest)})"
            for row in self.shown
            for variant, size in row.claimed.items()
            if size < row.largest < math.inf and not self.diverged
        ]
        if small:
            found.append(
                "Claimed changes that are smaller than what two equal trainings differ by with one "
                f"seed: {', '.join(small)}. Only their mean over seeds tells them from noise."
            )
        return [f"Noise floor: {text}" for text in found]

    def _which(self) -> str:
        if self.missing or len(self.seeds) == 1:
            return _seeds(self.seeds)
        return "both seeds" if len(self.seeds) == 2 else f"all {len(self.seeds)} seeds"


def noise_floor(comparison: Comparison, rows: list[SummaryRow]) -> NoiseFloor | None:
    """How far the baseline's two trainings differ; None where there is one only.

    Args:
        comparison: the results.
        rows: `summary_rows` of it.
    """
    if not comparison.again:
        return None
    again = {run.seed: run for run in comparison.again}
    base = {seed: comparison.run(comparison.baseline, seed) for seed in comparison.seeds}
    pairs = {s: (one, again[s]) for s, one in base.items() if one is not None and s in again}
    found = {row.metric: row for row in _metric_rows(comparison, pairs)}
    target = _target_row(comparison)
    if target is not None:
        found[target.metric] = target
    groups = {group[0].metric: group for group in by_metric(rows)}
    return NoiseFloor(
        baseline=comparison.baseline,
        seeds=tuple(pairs),
        missing=tuple(seed for seed in comparison.seeds if seed not in pairs),
        diverged=tuple(seed for seed in comparison.seeds if seed in again and again[seed].diverged),
        rows=tuple(
            _beside(row, groups.get(row.metric, []))
            for row in sorted(found.values(), key=lambda row: _place(comparison, row.metric))
        ),
    )


def noise_floor_csv(comparison: Comparison, floor: NoiseFloor) -> str:
    """A line for each metric in full precision; nothing for no number.

    The columns are named as those of table.csv. `diff_seed_` is the second training minus the first
    with that seed; of steps to target it is the ratio less 1, and `diff_scale` says that the other
    `diff_` columns are of logarithms.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    start = ("metric", "better", "num_pairs", "num_equal", "largest", "diff_scale")
    paired = {f"diff_{name}": name for name in ("mean", "std", "low", "high")}
    paired |= {name: name for name in ("confidence", "p_value")}
    end = ("detectable", "smallest_claimed", "largest_claimed", "never_reached_seeds")
    seeds = [f"diff_seed_{seed}" for seed in comparison.seeds]
    writer.writerow([*start, *paired, *end, *seeds])
    for row in floor.rows:
        sizes, is_target = row.claimed.values(), row.target is not None
        statistics = row.paired or _statistics([row]).get(row.metric)
        never = " ".join(map(str, row.target.never)) if row.target is not None else ""
        cells = [row.metric, row.quantity.better, len(row.differences), row.num_equal, row.largest]
        cells += ["log ratio" if is_target else "difference"]
        found = {column: getattr(statistics, name, None) for column, name in paired.items()}
        if row.target is not None and row.target.is_bound:
            found["diff_mean"] = None
        cells += found.values()
        cells += [row.detectable, min(sizes, default=None), max(sizes, default=None), never]
        cells += [row.differences.get(seed) for seed in comparison.seeds]
        writer.writerow(map(csv_cell, cells))
    return text.getvalue()


def _metric_rows(
    comparison: Comparison, pairs: dict[int, tuple[RunResult, RunResult]]
) -> list[FloorRow]:
    """A row for each metric that is no cost, as both trainings of any seed measured it."""
    numbers: dict[str, dict[int, tuple[float, float]]] = {}
    for seed, (one, two) in pairs.items():
        for metric in one.metrics:
            if metric in two.metrics and not comparison.quantity(metric).cost:
                numbers.setdefault(metric, {})[seed] = one.metrics[metric], two.metrics[metric]
    rows = [_metric_row(comparison.quantity(m), m, by_seed) for m, by_seed in numbers.items()]
    found = _statistics([row for row in rows if row.quantity.headline])
    return [replace(row, paired=found.get(row.metric)) for row in rows]


def _metric_row(
    meaning: Quantity, metric: str, numbers: dict[int, tuple[float, float]]
) -> FloorRow:
    return FloorRow(
        metric=metric,
        quantity=meaning,
        differences={s: 0.0 if _same(one, two) else two - one for s, (one, two) in numbers.items()},
        num_equal=sum(_same(one, two) for one, two in numbers.values()),
        scale=max(abs(value) for pair in numbers.values() for value in pair),
    )


def _statistics(rows: list[FloorRow]) -> dict[str, Paired]:
    """Statistics of metrics, corrected over all of these."""
    differences = {row.metric: list(row.differences.values()) for row in rows}
    return paired_statistics(differences, {row.metric: row.scale for row in rows})


def _same(one: float, two: float) -> bool:
    return one == two or (math.isnan(one) and math.isnan(two))


def _target_row(comparison: Comparison) -> FloorRow | None:
    """The steps to target of the second training, as if it were the only variant."""
    name = comparison.again[0].variant
    base = [run for run in comparison.results if run.variant == comparison.baseline]
    pair = replace(
        comparison,
        variants=(comparison.baseline, name),
        results=(*base, *comparison.again),
        again=(),
        finding=None,  # of variants that are left out
    )
    steps = steps_to_target(pair).get(name)
    if steps is None or not steps.ratios:
        return None
    return FloorRow(
        metric=STEPS_TO_TARGET,
        quantity=comparison.quantity(STEPS_TO_TARGET),
        differences={seed: ratio - 1.0 for seed, ratio in steps.ratios.items()},
        num_equal=sum(
            ratio == 1.0 and seed not in steps.never for seed, ratio in steps.ratios.items()
        ),
        paired=steps.paired,
        target=steps,
    )


def _beside(row: FloorRow, group: list[SummaryRow]) -> FloorRow:
    """The row with what could be seen, and what is claimed, of the variants."""
    seen = [r.paired.detectable for r in group if r.paired and r.paired.detectable is not None]
    claimed = {}
    for other in group:
        if other.change and other.target is not None and other.target.mean is not None:
            claimed[other.variant] = abs(other.target.mean - 1.0)
        elif other.change and other.paired is not None:
            claimed[other.variant] = abs(other.paired.mean)
    return replace(row, detectable=min(seen, default=None), claimed=claimed)


def _seen(row: FloorRow) -> str:
    return "" if row.detectable is None else f" (could have seen {row.size(row.detectable)})"


def _place(comparison: Comparison, metric: str) -> tuple[object, ...]:
    """The order of the summary table: steps to target behind their loss."""
    if metric == STEPS_TO_TARGET:
        return *place_of(comparison, TARGET), 1
    return *place_of(comparison, metric), 0


def _seeds(seeds: tuple[int, ...]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
