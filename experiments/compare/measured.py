"""Which metrics a sweep, or the finding of a comparison, may name: those that its runs measure."""

from collections.abc import Mapping

from alignlab.config.data import unknown_name
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.evaluation.measured_names import measured_names, needs_met
from alignlab.evaluation.metric_registry import METRICS
from alignlab.evaluation.own_metrics import installed_metrics
from alignlab.experiments.compare.config import CompareConfig
from alignlab.experiments.report.metric_table import COST_QUANTITIES, STEPS_TO_TARGET, split_name


def check_measured(setting: str, name: str, names: list[str], base: RunConfig) -> None:
    """Refuses a metric that no run measures, or that no training changes.

    Args:
        setting: that names it, for the message.
        name: of the metric.
        names: what the runs measure.
        base: one of them.

    Raises:
        UserError: what the recipe lacks for it, or which names there are.
    """
    if name.startswith("gen_real/") and name in names:
        raise UserError(f"{setting}: {name} is of the real clips, no training changes it")
    if name in names:
        return
    asked, _ = split_name(name)
    of_blocks = [known for known in names if split_name(known)[0] == asked]
    whole = [known for known in names if split_name(known)[1] in ("", "mean")]
    why = _why_not_measured(asked, base)
    raise UserError(f"{setting}: {why}{unknown_name('metric', name, of_blocks or whole)}")


def check_expectations(config: CompareConfig, runs: Mapping[str, RunConfig]) -> None:
    """Refuses a finding whose expectations could not be judged, before anything is trained.

    Args:
        config: the comparison.
        runs: of each variant, with the blocks that are measured.

    Raises:
        UserError: an expected metric is not measured of its variant or of the baseline.
    """
    if config.finding is None:
        return
    for place, expected in enumerate(config.finding.expect):
        for variant in (config.baseline, expected.variant):
            run, setting = runs[variant], f"finding.expect.{place}.metric"
            if expected.metric == STEPS_TO_TARGET and run.eval.every is None:
                raise UserError(
                    f"{setting}: {STEPS_TO_TARGET} needs validation during training; set eval.every"
                )
            if expected.metric in COST_QUANTITIES and config.cost is None:
                raise UserError(
                    f"{setting}: {expected.metric} is not measured with cost: null; remove that"
                )
            known = [*measured_names(run), *(() if run.eval.every is None else (STEPS_TO_TARGET,))]
            known += [] if config.cost is None else [*COST_QUANTITIES]
            check_measured(setting, expected.metric, known, run)


def _why_not_measured(asked: str, base: RunConfig) -> str:
    """Of a metric that other recipes measure, what this one lacks."""
    own = asked.removeprefix("gen/")
    if asked.startswith("gen/") and any(one.row for one in installed_metrics(own)):
        return f"{asked} is measured with eval.metrics: [{own}]; "
    metric = METRICS.get(asked)
    if metric is None:
        return ""
    if asked.startswith("gen/") and not base.eval.num_measured_clips:
        return "no generated clip is measured (eval.generated_clips); "
    met = needs_met(base)
    lacks = [need for need in metric.needs if need not in met]
    if not asked.startswith(("gen/", "val/")) and "any teacher" not in met:
        lacks = ["any teacher"]
    return f"{asked} needs {', '.join(lacks)}; " if lacks else ""
