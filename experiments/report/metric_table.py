"""What the metrics of a report are called, and which way is better.

A metric name is a base name and an optional part: `retrieval/block3` is `retrieval` at block 3,
`retrieval/mean` its mean over blocks, `val/flow/t7` is `val/flow` in timestep bin 7.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

Direction = Literal["lower", "higher", "none"]
ARROWS: dict[Direction, str] = {"lower": "↓", "higher": "↑", "none": ""}

_PART = re.compile(r"/(?:block(?P<block>\d+)|t(?P<bin>\d)|(?P<mean>mean))$")


@dataclass(frozen=True)
class Quantity:
    """One row of the table below.

    Args:
        label: what a reader calls it.
        better: which way is better; "none" where neither is, or where it depends.
        headline: shown in the summary table.
        cost: shown with the costs, behind the qualities.
        slower: a time, which the verdict gives as a share of the baseline's.
    """

    label: str
    better: Direction = "none"
    headline: bool = False
    cost: bool = False
    slower: bool = False


# Of generated clips (docs/metrics.md). Identity stands beside copy-paste, because pasting the
# reference raises it. Motion makes frames differ as flicker does: neither has a better side. Nor
# have contrast and colourfulness: those of the real clips are right.
_GENERATED: dict[str, Quantity] = {
    "identity_proxy": Quantity("subject identity (proxy)", "higher", headline=True),
    "copy_paste_proxy": Quantity("copy-paste (proxy)", "lower", headline=True),
    "confusion_proxy": Quantity("subject confusion (proxy)", "lower", headline=True),
    "reference_match_proxy": Quantity("best match of a reference (proxy)", "higher"),
    "found_proxy": Quantity("named subjects shown (proxy)", "higher"),
    "entities_proxy": Quantity("entities too many or too few (proxy)", "lower"),
    "motion_proxy": Quantity("motion as captioned (proxy)", "higher"),
    "frechet": Quantity("Fréchet distance of frames", "lower"),
    "contrast": Quantity("RMS contrast"),
    "colourfulness": Quantity("colourfulness (Hasler and Süsstrunk)"),
    "colour_cast": Quantity("colour cast (CIELAB difference)", "lower"),
    "flicker": Quantity("temporal flickering score (VBench)"),
    "motion_amplitude": Quantity("motion amplitude (OpenS2V)"),
}

# In the order of the summary table. Agreement with the teacher (CKNNA) is what an alignment loss
# trains, not a goal in itself: no direction.
QUANTITIES: dict[str, Quantity] = {
    "val/flow": Quantity("validation flow loss", "lower", headline=True),
    "retrieval": Quantity("subject retrieval", "higher", headline=True),
    "teacher_retrieval": Quantity("retrieval in teacher space", "higher", headline=True),
    "teacher_retrieval_chance": Quantity("retrieval in teacher space by chance"),
    "silhouette": Quantity("subject silhouette", "higher", headline=True),
    "cross_cos": Quantity("cross-subject cosine", "lower", headline=True),
    "cknna": Quantity("CKNNA to teacher"),
    **{f"gen/{name}": row for name, row in _GENERATED.items()},
    **{f"gen_real/{name}": Quantity(f"{r.label}, real clips") for name, r in _GENERATED.items()},
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


def quantity(metric: str) -> Quantity:
    """Meaning of a metric; a name that the table does not know is its own label."""
    base, part = split_name(metric)
    known = QUANTITIES.get(base) or COST_QUANTITIES.get(base) or Quantity(base)
    label = known.label + _part_label(metric)
    whole = part in ("", "mean")
    return replace(known, label=label, headline=known.headline and whole)


def _part_label(metric: str) -> str:
    match = _PART.search(metric)
    if match is None:
        return ""
    if match["mean"]:
        return ", block mean"
    if match["block"]:
        # Papers count from one: "depth d" is block d - 1.
        return f", block {match['block']} (depth {int(match['block']) + 1})"
    low = int(match["bin"]) / 10
    return f", t {low:.1f} to {low + 0.1:.1f}"
