"""What a report makes of the metrics' table: order, parts of names, costs.

Labels and directions are those of `alignlab.evaluation.metric_registry`.

A metric name is a base name and an optional part: `retrieval/block3` is `retrieval` at block 3,
`retrieval/mean` its mean over blocks, `val/flow/t7` is `val/flow` in timestep bin 7.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from alignlab.evaluation.metric_registry import METRICS
from alignlab.evaluation.metric_registry import Direction as Direction

ARROWS: dict[Direction, str] = {"lower": "↓", "higher": "↑", "none": ""}

_PART = re.compile(r"/(?:block(?P<block>\d+)|t(?P<bin>\d)|(?P<mean>mean))$")


@dataclass(frozen=True)
class Quantity:
    """What a report shows of one metric.

    Args:
        label: what a reader calls it.
        better: which way is better; "none" where neither is, or where it depends.
        headline: shown in the summary table.
        cost: shown with the costs, behind the qualities.
        slower: a time, which the verdict gives as a share of the baseline's.
        unit: of its values, where the label does not say it.
    """

    label: str
    better: Direction = "none"
    headline: bool = False
    cost: bool = False
    slower: bool = False
    unit: str = ""

    @property
    def heading(self) -> str:
        """Label and unit, for the head of a table."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


# A report's order where it is not that of the table of metrics, whose other rows follow. Identity
# stands beside copy-paste, because pasting the reference raises it.
_FIRST = (
    "val/flow",
    "retrieval",
    "teacher_retrieval",
    "teacher_retrieval_chance",
    "silhouette",
    "cross_cos",
    "cknna",
    "gen/identity_proxy",
    "gen/copy_paste_proxy",
    "gen/confusion_proxy",
    "gen/reference_match_proxy",
    "gen/found_proxy",
    "gen/entities_proxy",
    "gen/motion_proxy",
    "gen/frechet",
)


# No run measures it any more; results of older ones may have it.
_OLDER = {"retrieval": Quantity("subject retrieval", "higher", headline=True)}


def _quantities() -> dict[str, Quantity]:
    """Every metric in a report's order, then what the real clips have of it, which has no side."""
    known = _OLDER | {
        name: Quantity(metric.label, metric.better, metric.headline)
        for name, metric in METRICS.items()
    }
    ordered = {name: known[name] for name in dict.fromkeys((*_FIRST, *METRICS))}
    real = {
        name.replace("gen/", "gen_real/"): Quantity(f"{shown.label}, real clips")
        for name, shown in ordered.items()
        if name.startswith("gen/")
    }
    return ordered | real


# In the order of the summary table: metrics, then what every run costs.
QUANTITIES: dict[str, Quantity] = {
    **_quantities(),
    "time/step": Quantity("step time (s)", "lower", headline=True, cost=True, slower=True),
    "memory/peak_mib": Quantity("peak memory (MiB)", "lower", headline=True, cost=True),
    "params/extra": Quantity("extra parameters", "lower", headline=True, cost=True),
}

# Measured once for all seeds (`experiments/compare/cost.py`): no run has them, no sweep can ask
# for them.
COST_QUANTITIES: dict[str, Quantity] = {
    "cost/step": Quantity(
        "step time, interleaved (s)", "lower", headline=True, cost=True, slower=True
    ),
    "cost/gflop": Quantity("GFLOP per step", "lower", headline=True, cost=True),
    "cost/memory_mib": Quantity("peak memory, alone (MiB)", "lower", headline=True, cost=True),
}
# Of a variant against the baseline (`experiments/report/steps_to_target.py`): no run has it either.
STEPS_TO_TARGET = "steps_to_target"
_COMPARED = {STEPS_TO_TARGET: Quantity("steps to target", "lower", headline=True)}

_NONE: Mapping[str, Quantity] = MappingProxyType({})

# What is then no longer shown in the summary table: it depends on the order of the runs.
REPLACED_BY = {"time/step": "cost/step", "memory/peak_mib": "cost/memory_mib"}


def split_name(metric: str) -> tuple[str, str]:
    """Split a metric name into base and part: ("retrieval", "block3"), ("val/flow", "")."""
    match = _PART.search(metric)
    return (metric[: match.start()], metric[match.start() + 1 :]) if match else (metric, "")


def block_of(metric: str) -> int | None:
    """The block index in a metric name, or None."""
    match = _PART.search(metric)
    return int(match["block"]) if match and match["block"] else None


def bin_of(metric: str) -> int | None:
    """The bin of the timestep in a metric name, or None."""
    match = _PART.search(metric)
    return int(match["bin"]) if match and match["bin"] else None


def quantity(
    metric: str, own: Mapping[str, Quantity] = _NONE, expert: str | None = None
) -> Quantity:
    """Meaning of a metric; a name that is not known is its own label.

    Args:
        metric: flat name.
        own: metrics of other packages, by base name. What one means is said by the comparison or
            the recipe at hand, and by nothing else; alignlab's own keep their meaning.
        expert: `model.expert` of the runs, if they have one.
    """
    base, part = split_name(metric)
    ours = QUANTITIES | COST_QUANTITIES | _COMPARED
    known = ours.get(base) or own.get(base) or Quantity(base)
    label = known.label + _part_label(metric, expert)
    whole = part in ("", "mean")
    return replace(known, label=label, headline=known.headline and whole)


def _part_label(metric: str, expert: str | None) -> str:
    match = _PART.search(metric)
    if match is None:
        return ""
    if match["mean"]:
        return ", block mean"
    if match["block"]:
        # Papers count from one: "depth d" is block d - 1.
        return f", block {match['block']} (depth {int(match['block']) + 1})"
    if expert is not None:
        return f", tenth {int(match['bin']) + 1} of the {expert}-noise expert's t"
    low = int(match["bin"]) / 10
    return f", t {low:.1f} to {low + 0.1:.1f}"
