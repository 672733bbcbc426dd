"""Metrics of other packages (`eval.metrics`): measured alike in all runs, and known to reports.

How one is shown is kept with the result, so that a report needs no package. Versions count: what
another version measures is another number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from alignlab.config.parts import EvalConfig
from alignlab.errors import UserError
from alignlab.evaluation.own_metrics import described
from alignlab.experiments.report.metric_table import Quantity
from alignlab.runs.checksums import DamagedError
from alignlab.runs.inputs import Input
from alignlab.runs.run_folder import RunFolder


@dataclass(frozen=True)
class OwnMetric:
    """A metric of generated clips that another package has measured (`eval.metrics`).

    Args:
        package: that registers it.
        version: of the package.
        label: what a reader calls it.
        better: which way is better; "none" where neither is.
        headline: shown in the summary table.
        unit: of its values.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    package: str
    version: str
    label: str
    better: Literal["lower", "higher", "none"] = "none"
    headline: bool = False
    unit: str = ""


OwnMetrics = dict[str, OwnMetric]
_ADAPTER: TypeAdapter[OwnMetrics] = TypeAdapter(OwnMetrics)


def installed_own_metrics(evaluation: EvalConfig) -> OwnMetrics:
    """What would measure the runs of a recipe today.

    Raises:
        UserError: a package is not installed, or its metric cannot be measured here.
    """
    return _ADAPTER.validate_python(described(evaluation.metrics))


def own_metrics_of(run: RunFolder) -> OwnMetrics | None:
    """What has measured a run; None for one that is not finished.

    Raises:
        UserError: its result does not say it in a form that this version reads.
    """
    result = run.read_result()
    if result is None:
        return None
    try:
        return _ADAPTER.validate_python(result.get("own_metrics", {}))
    except ValidationError as error:
        reason = f"own_metrics: {error.errors(include_url=False)[0]['msg']}"
        fix = "copy it back from elsewhere, or train the run again"
        raise DamagedError(run.result, reason, fix) from None


def measured_alike(runs: Iterable[tuple[RunFolder, EvalConfig]]) -> OwnMetrics:
    """What has measured the finished runs of a comparison, and will measure the others.

    Args:
        runs: each with how it is evaluated.

    Raises:
        UserError: two runs were measured by other versions, or one was by another version than
            is installed and measures the rest.
    """
    found: dict[Path, OwnMetrics] = {}
    today = Path("what is installed")
    for run, evaluation in runs:
        finished = own_metrics_of(run)
        if finished is not None:
            found[run.path] = finished
        elif evaluation.metrics:
            found[today] = found.get(today, {}) | installed_own_metrics(evaluation)
    for (one, here), (other, there) in combinations(found.items(), 2):
        remedy = "install one version for all, and train the other runs under another name=..."
        refuse_other_versions(here, there, f"{one} and {other}", remedy)
    return {name: metric for metrics in found.values() for name, metric in metrics.items()}


def refuse_other_versions(here: OwnMetrics, there: OwnMetrics, pair: str, remedy: str) -> None:
    """Refuses what was measured under one name by other packages or versions.

    Args:
        here: of one.
        there: of another one.
        pair: both, for the message.
        remedy: what can be done.

    Raises:
        UserError: it names the metric and the versions.
    """
    for name in here.keys() & there.keys():
        one, other = (f"{m.package} {m.version}" for m in (here[name], there[name]))
        if one != other:
            raise UserError(f"{pair}: gen/{name} is measured by {one} and by {other}: {remedy}")


def packages_of(metrics: Mapping[str, OwnMetric]) -> dict[str, str]:
    """The packages among the facts of an environment; empty without any."""
    packages = sorted({f"{metric.package} {metric.version}" for metric in metrics.values()})
    return {"metric_packages": ", ".join(packages)} if packages else {}


def as_inputs(metrics: Mapping[str, OwnMetric]) -> list[Input]:
    """Packages as inputs, for what keeps a record of those alone."""
    return [
        Input(f"eval.metrics.{name}", name, {f"{one.package} {one.version}": one.version})
        for name, one in metrics.items()
    ]


def own_quantities(metrics: Mapping[str, OwnMetric]) -> dict[str, Quantity]:
    """How reports show them, by full name: of generated clips, and of the real ones."""
    found = {}
    for name, metric in metrics.items():
        label, unit = metric.label, metric.unit
        found[f"gen/{name}"] = Quantity(label, metric.better, metric.headline, unit=unit)
        found[f"gen_real/{name}"] = Quantity(f"{label}, real clips", unit=unit)
    return found
