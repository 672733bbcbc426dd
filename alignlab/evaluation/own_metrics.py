"""Metrics of generated clips that other installed packages register (docs/own-metric.md).

An entry point of the group `alignlab.metrics` stands for a `ClipMetric`; `eval.metrics` names those
that a run measures besides its own, and no other is loaded. One that cannot be used is a line of
text: it keeps nothing else from running.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from numbers import Real
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from alignlab.config.data import unknown_name
from alignlab.data.sample import Sample
from alignlab.errors import UserError, printable, shown
from alignlab.evaluation.generation_metrics import GeneratedClip
from alignlab.evaluation.metric_registry import (
    GENERATION_METRICS,
    Direction,
    GenerationMetric,
    mean,
)
from alignlab.foreign_code import call_foreign
from alignlab.kernels.plugins import (
    NAME,
    NAME_RULE,
    ImplementationError,
    find_named,
    reason_of,
    signature_problem,
)
from alignlab.losses.plugins import InstalledRow, told_rows
from alignlab.metrics.plugins import Clip, ClipMetric

GROUP = "alignlab.metrics"
"""Entry point group under which other packages register metrics of generated clips."""
WHAT = "metric"
# `gen/mean` would be read as the mean over blocks of something.
PART = r"mean|t\d|block\d+"
SEED = 0  # of torch's random numbers in each call

InstalledMetric = InstalledRow[ClipMetric]


def _measured(clip: Any) -> Any:
    """Takes what every `measure` takes."""


def _reduced(values: Any) -> Any:
    """Takes what every `reduce` takes."""


@cache
def installed_metrics(only: str | None = None) -> tuple[InstalledMetric, ...]:
    """What packages register, in the order of names; what cannot be used has a problem.

    Args:
        only: the name that is asked for: nothing else is loaded. None: all are.
    """
    found = told_rows(GROUP, WHAT, GENERATION_METRICS, ClipMetric, _problem, only)
    return tuple(map(_well_named, found))


def _problem(row: ClipMetric) -> str | None:
    """Says what keeps a row from being used."""
    for name, text in (("label", row.label), ("unit", row.unit)):
        is_line = isinstance(text, str) and printable(text) == text
        if not is_line or (name == "label" and not text.strip()):
            return f"has {name} {shown(text)}, which is no line of text"
    if row.better not in get_args(Direction):
        return f"has better {shown(row.better)}: choose from {', '.join(get_args(Direction))}"
    if not isinstance(row.headline, bool):
        return f"has headline {shown(row.headline)}: choose True or False"
    if not callable(row.missing):
        return "has a missing that cannot be called"
    for name, function, reference in (
        ("measure", row.measure, _measured),
        ("reduce", row.reduce, _reduced),
    ):
        if function is None and name == "reduce":
            continue
        problem = signature_problem(function, reference)
        if problem is not None:
            return f"has a {name} that {problem}"
    return None


def _well_named(one: InstalledMetric) -> InstalledMetric:
    rule = None if re.fullmatch(NAME, one.name) else NAME_RULE
    if re.fullmatch(PART, one.name):
        rule = "parts of metrics are named so (mean, t0 to t9, block0, ...)"
    if one.problem is not None or rule is None:
        return one
    line = f"package {one.package} registers {WHAT} {one.name!r}: {rule}"
    return one._replace(row=None, problem=line)


def find_metric(asked: str) -> InstalledMetric:
    """The metric that a recipe names, as `name` or `name@package`.

    Raises:
        UserError: there is none, or it cannot be measured here.
    """
    found = _find(asked)
    assert found.row is not None
    reason = reason_of(found.row.missing)
    if reason is not None:
        raise UserError(f"eval.metrics: {found.full_name} cannot be measured: {reason}")
    return found


def full_names(asked: Sequence[str], *, stored: bool) -> tuple[str, ...]:
    """The names by which a recipe keeps metrics: with the package that each needs.

    Args:
        asked: as a user gives them, with `@package` or without.
        stored: in the recipe of a run that was trained, a package may be gone since: reading and
            exporting the run do without (`find_metric`).

    Raises:
        ValueError: one is not there or named twice; it says why.
    """
    kept: dict[str, str] = {}
    for name in asked:
        bare, _, package = name.partition("@")
        if bare in kept:
            raise ValueError(f"{bare} is named twice")
        try:
            kept[bare] = name if stored and bare and package else _find(name).full_name
        except UserError as error:
            raise ValueError(str(error).removeprefix("eval.metrics: ")) from None
    return tuple(kept.values())


def _find(asked: str) -> InstalledMetric:
    name = asked.partition("@")[0]
    found, names = installed_metrics(name), sorted(entry_points(group=GROUP).names)
    if name in GENERATION_METRICS and not found:
        raise UserError(
            f"eval.metrics: gen/{name} is measured of every run that has what it needs; name "
            "metrics of other packages alone"
        )
    try:
        return find_named(asked, found, f"{WHAT} {{}}", ", ".join(names) or "none")
    except ImplementationError as error:
        raise UserError(f"eval.metrics: {error}") from None
    except KeyError:
        unknown = unknown_name(WHAT, asked, names, of_packages=True)
        raise UserError(f"eval.metrics: {unknown}") from None


def own_names(asked: Iterable[str]) -> list[str]:
    """Those of `eval.metrics` as `gen/` has them, without their packages."""
    return [name.partition("@")[0] for name in asked]


def described(asked: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By name, which package measures it and how it is shown, as `result.json` keeps it.

    Raises:
        UserError: as `find_metric`.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name in asked:
        one = find_metric(name)
        assert one.row is not None
        facts[one.name] = {"package": one.package, "version": one.version}
        facts[one.name] |= {key: getattr(one.row, key) for key in ("label", "better", "headline")}
        facts[one.name]["unit"] = one.row.unit
    return facts


def own_rows(
    asked: Iterable[str], *, fps: int, device: torch.device
) -> dict[str, GenerationMetric]:
    """The rows of a recipe's `eval.metrics`, as those of alignlab's own metrics.

    Args:
        asked: `eval.metrics`.
        fps: of the clips.
        device: where the run computes.

    Raises:
        UserError: as `find_metric`. What the rows give is looked at: of anything but one finite
            number there is one line, and so of what their functions raise.
    """
    rows: dict[str, GenerationMetric] = {}
    for name in asked:
        one = find_metric(name)
        assert one.row is not None
        calls = _Calls(one.full_name, one.row, fps, device)
        rows[one.name] = GenerationMetric(
            one.row.label,
            unit=one.row.unit,
            better=one.row.better,
            headline=one.row.headline,
            measure=calls.measure,
            reduce=calls.reduce,
        )
    return rows


def try_metrics(
    asked: Sequence[str], samples: Iterable[Sample], *, fps: int, device: torch.device
) -> None:
    """Measures real clips in place of generated ones: what fails is told before a training.

    Args:
        asked: as in `own_rows`, and so `fps` and `device`.
        samples: of the val split; the first few are taken.
        fps: see there.
        device: see there.

    Raises:
        UserError: as `own_rows` and its rows.
    """
    rows = own_rows(asked, fps=fps, device=device)
    clips = [GeneratedClip(s.video_THWC, s, None, (1, 1), False) for s in samples]
    for row in rows.values():
        values = [value for clip in clips for value in row.measure(clip)]
        if values:
            row.reduce(values)


@dataclass(frozen=True)
class _Calls:
    """Calls the functions of a metric, and looks at what they give.

    Neither what a metric draws nor what it writes into its clip changes anything else: torch's
    random numbers begin alike for every call, and go on afterwards as if there had been none.
    """

    name: str
    row: ClipMetric
    fps: int
    device: torch.device

    def measure(self, generated: GeneratedClip) -> list[Any]:
        sample = generated.sample
        clip = Clip(
            sample.key,
            generated.video_THWC.clone(),
            sample.video_THWC.clone(),
            sample.caption,
            tuple(
                replace(one, image_HWC=one.image_HWC.clone(), mask_HW=one.mask_HW.clone())
                for one in sample.references
            ),
            sample.entities,
            None if sample.masks_ETHW is None else sample.masks_ETHW.clone(),
            self.fps,
            self.device,
            None if sample.undecided_THW is None else sample.undecided_THW.clone(),
        )
        what = f"clip {sample.key}"
        value = self._called(what, self.row.measure, clip)
        if value is None:
            return []
        return [value if self.row.reduce is not None else self._number(what, value)]

    def reduce(self, values: Sequence[Any]) -> float | None:
        if self.row.reduce is None:
            return mean(values)
        what = f"reduce of {len(values)} clips"
        value = self._called(what, self.row.reduce, list(values))
        return None if value is None else self._number(what, value)

    def _called(self, what: str, function: Callable[[Any], Any], argument: Any) -> Any:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(SEED)
            return call_foreign(f"eval.metrics: {self.name}: {what}", function, argument)

    def _number(self, what: str, value: Any) -> float:
        if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
            value = value.item()
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
        if isinstance(value, Tensor | np.ndarray):
            gave = f"values of shape {tuple(value.shape)}"
        else:
            gave = str(value) if isinstance(value, Real) else shown(value)
        raise UserError(f"eval.metrics: {self.name}: {what}: gave {gave}, not one finite number")
