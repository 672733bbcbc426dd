"""Which metrics a run of a recipe can measure, known before anything is built."""

from collections.abc import Sequence

from alignlab.config.run import RunConfig
from alignlab.evaluation.evaluate import FLOW_BINS
from alignlab.evaluation.metric_registry import (
    GENERATION_METRICS,
    REFERENCE_METRICS,
    VIDEO_METRICS,
    Metric,
    Need,
)
from alignlab.evaluation.own_metrics import own_names
from alignlab.teachers import TEACHERS

COSTS = ("time/step", "memory/peak_mib", "params/extra")


def measured_names(config: RunConfig, blocks: Sequence[int] | None = None) -> list[str]:
    """Names of all metrics that `result.json` of a run may hold, in the order of their tables.

    A name that is not among them is measured by no run of this recipe, whatever it learns.

    Args:
        config: the run.
        blocks: whose tokens are measured; None: those of `eval.blocks`, or that objectives align.
    """
    met = needs_met(config)
    names = ["val/flow", *(f"val/flow/t{b}" for b in range(FLOW_BINS))]
    if blocks is None:
        blocks = config.eval.blocks
    if blocks is None:
        blocks = sorted({b for o in config.objectives.values() for b in o.tapped_blocks})
    if config.measured_against is not None and blocks:
        parts = [*(f"block{block}" for block in blocks), "mean"]
        for name, metric in {**REFERENCE_METRICS, **VIDEO_METRICS}.items():
            if _is_measured(metric, met):
                one = name in REFERENCE_METRICS and not REFERENCE_METRICS[name].by_block
                names += [name] if one else [f"{name}/{part}" for part in parts]
    if config.eval.num_measured_clips:
        kept = [name for name, metric in GENERATION_METRICS.items() if _is_measured(metric, met)]
        kept += own_names(config.eval.metrics)
        names += [f"{prefix}/{name}" for prefix in ("gen", "gen_real") for name in kept]
    return [*names, *COSTS]


def lacking_a_teacher(config: RunConfig) -> tuple[list[str], list[str]]:
    """Metrics of tokens and of generated clips, by the names of their tables, that a run measures
    only because a teacher is named: what a recipe without one goes without.

    Args:
        config: the run, without a teacher that reads frames.
    """
    met = needs_met(config)
    with_teacher: set[Need] = met | {"image teacher", "any teacher"}
    of_tokens: dict[str, Metric] = {**REFERENCE_METRICS, **VIDEO_METRICS}
    return (
        [name for name, metric in of_tokens.items() if _is_measured(metric, with_teacher)],
        [
            name
            for name, metric in GENERATION_METRICS.items()
            if _is_measured(metric, with_teacher) and not _is_measured(metric, met)
        ],
    )


def needs_met(config: RunConfig) -> set[Need]:
    """What the recipe has of that which metrics need."""
    alias, most = config.measured_against, config.data.references[1]
    is_image = alias is not None and not TEACHERS[config.teachers[alias].family].video
    has: dict[Need, bool] = {
        "references": most >= 1,
        "two references": most >= 2,
        "image teacher": is_image,
        "any teacher": alias is not None,
        "two frames": config.data.frames >= 2,
        "two clips": config.eval.clips >= 2,
        "subjects by colour": config.data.subjects_by_colour,
    }
    return {need for need, holds in has.items() if holds}


def _is_measured(metric: Metric, met: set[Need]) -> bool:
    return met.issuperset(metric.needs)
