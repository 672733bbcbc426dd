"""Which metrics a sweep can optimise or bound, and which way is better."""

from collections.abc import Mapping
from typing import Literal

from alignlab.errors import UserError
from alignlab.evaluation.measured_names import measured_names
from alignlab.experiments.compare.measured import check_measured
from alignlab.experiments.compare.own_metrics import installed_own_metrics, own_quantities
from alignlab.experiments.report.metric_table import Quantity, quantity
from alignlab.experiments.sweep.config import MetricConfig, SweepConfig
from alignlab.experiments.sweep.space import tapped_blocks

Direction = Literal["minimize", "maximize"]


def check_metrics(config: SweepConfig) -> None:
    """Refuses, before there is a study, metrics and constraints that can lead nowhere.

    Raises:
        UserError: a metric that no trial measures or changes, that has no better side and no
            direction, or a direction or constraint that points to its worse side.
    """
    own = own_quantities(installed_own_metrics(config.base.eval))
    blocks = config.base.eval.blocks
    names = measured_names(config.base, tapped_blocks(config) if blocks is None else blocks)
    for metric in config.metric:
        check_measured("metric", metric.name, names, config.base)
    directions(config)
    for name in config.constraints:
        check_measured(f"constraints.{name}", name, names, config.base)
        if quantity(name, own).better == "higher":
            raise UserError(
                f"constraints.{name}: a constraint is the largest value that a metric may have, "
                "and of this one more is better: it would leave out the best trials; remove it"
            )


def directions(config: SweepConfig) -> list[Direction]:
    """`minimize` or `maximize` for each metric.

    Raises:
        UserError: a metric with no better side, or a direction to its worse one; or the recipe
            names a metric of a package that is not installed.
    """
    own = own_quantities(installed_own_metrics(config.base.eval))
    return [_direction(metric, own) for metric in config.metric]


def _direction(metric: MetricConfig, own: Mapping[str, Quantity]) -> Direction:
    better = quantity(metric.name, own).better
    if better == "none":
        if metric.direction is None:
            raise UserError(
                f"metric: {metric.name} has no better side of its own: "
                f"write {{name: {metric.name}, direction: minimize}} (or maximize)"
            )
        return metric.direction
    right: Direction = "minimize" if better == "lower" else "maximize"
    if metric.direction not in (None, right):
        raise UserError(
            f"metric: {metric.name} is the better the {better} it is, {metric.direction} would "
            "search for the worst trial; remove direction"
        )
    return right
