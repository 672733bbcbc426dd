"""Whether several finished comparisons were measured alike, so that they can be one.

What is asked of the variants of one comparison before it trains (`fairness`) is asked here of
comparisons that have trained: the same shared settings, budget and inputs, and of a variant or a
run that several have, the same settings and numbers.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alignlab.config.merging import canonical, merge
from alignlab.config.paths import user_path
from alignlab.config.recipe_file import UNREADABLE
from alignlab.config.run import RunConfig
from alignlab.environment import CHANGE_BITS
from alignlab.errors import UserError, one_line
from alignlab.experiments.compare.config import (
    COMPARE_KEYS,
    OPTIONAL_COMPARE_KEYS,
    settings_of,
)
from alignlab.experiments.compare.fairness import unequal_tuning
from alignlab.experiments.compare.own_metrics import refuse_other_versions
from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.report.metric_table import quantity
from alignlab.recipe import first_difference, load_run, validated
from alignlab.runs.input_record import InputRecord

log = logging.getLogger(__name__)

BLOCKS = "eval.blocks"
"""What a run is measured on follows from all variants of a comparison: merging sees to it."""


@dataclass(frozen=True)
class Source:
    """A comparison that is to be merged, and its folder."""

    folder: Path
    comparison: Comparison

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe as plain nested settings, the changes of the variants by dotted key.

        Raises:
            UserError: it is none.
        """
        try:
            content = OmegaConf.to_container(OmegaConf.create(self.comparison.recipe))
            if not isinstance(content, dict) or not isinstance(content.get("variants"), dict):
                raise UserError("it has no variants")
            recipe = {str(key): value for key, value in content.items()}
            for variant in self.comparison.variants:
                if variant not in recipe["variants"]:
                    raise UserError(f"it has no variant {variant!r}")
            changes = {v: canonical(recipe["variants"][v]) for v in self.comparison.variants}
        except (*UNREADABLE, UserError) as error:
            raise self._unread(error) from None
        return recipe | {"variants": changes}

    @cached_property
    def base(self) -> RunConfig:
        """What all variants share.

        Raises:
            UserError: this version does not know such settings.
        """
        return self._run({})

    def settings(self, variant: str) -> dict[str, Any]:
        """A variant's settings that change a number, by dotted key.

        Raises:
            UserError: a sweep has tuned it, and no run is there that says what it gave.
        """
        changes = self.recipe["variants"][variant]
        if "from" in changes:
            return self._tuned_settings(variant)
        settings = settings_of(self._run(changes))
        for key, values in self.comparison.differing.items():
            settings[key] = values.get(variant)
        return {key: value for key, value in settings.items() if value is not None}

    def _tuned_settings(self, variant: str) -> dict[str, Any]:
        """From a run's own recipe: that of the comparison names the sweep alone."""
        for run in self.comparison.results:
            recipe = self.folder / run.run_dir / "recipe.yaml"
            if run.variant == variant and recipe.is_file():
                settings = settings_of(load_run(recipe, stored=True))
                shared = settings_of(self.base)
                for key in (BLOCKS, "steps"):  # which the comparison decides
                    settings[key] = shared.get(key)
                return {key: value for key, value in settings.items() if value is not None}
        raise UserError(
            f"{self.folder}: variant {variant} comes from a sweep, and its run folders, which say "
            "what that gave, are not there: not merged"
        )

    def record(self, run: RunResult) -> InputRecord:
        """What a run has read, if it is known."""
        return InputRecord(self.folder / run.run_dir, str(user_path(self.base.output)))

    def _run(self, changes: Mapping[str, Any]) -> RunConfig:
        keys = {*COMPARE_KEYS, *OPTIONAL_COMPARE_KEYS}
        shared = {key: value for key, value in self.recipe.items() if key not in keys}
        try:
            return validated(RunConfig, merge(shared, changes), stored=True)
        except UserError as error:
            raise self._unread(error) from None

    def _unread(self, error: Exception) -> UserError:
        return UserError(
            f"{self.folder}: its recipe cannot be read by this version, so it cannot be merged "
            f"({one_line(error)})"
        )


def refuse_others(first: Source, other: Source) -> None:
    """Refuses a comparison that was not measured as the first one.

    Raises:
        UserError: it names the first setting, run or file in which they differ.
    """
    here, there = first.comparison, other.comparison
    pair = f"{first.folder} and {other.folder}"
    shared = _first_difference(settings_of(first.base), settings_of(other.base))
    if shared:
        raise UserError(f"{pair}: their variants share other settings ({shared}): not merged")
    kinds = [_kind(one) for one in (here, there)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{pair}: one is at {kinds[0]}, one at {kinds[1]}: not merged")
    if here.budget is not None and here.baseline != there.baseline:
        raise UserError(
            f"{pair}: one has the {kinds[0]} of {here.baseline}, one that of {there.baseline}: "
            "not merged"
        )
    for variant in (v for v in here.variants if v in there.variants):
        difference = _first_difference(first.settings(variant), other.settings(variant))
        if not difference:
            difference = _other_steps(here, there, variant)
        if difference:
            raise UserError(f"{pair}: variant {variant} has other settings ({difference})")
    _refuse_other_inputs(first, other)
    refuse_other_versions(here.own_metrics, there.own_metrics, pair, "not merged")
    _tell_evaluations(first, other)


def refuse_other_numbers(one: RunResult, other: RunResult, pair: str) -> None:
    """Refuses the same run with other numbers, but for what depends on the machine's load.

    Raises:
        UserError: it names the run and the first number.
    """
    for name, here, there in _numbers(one, other):
        if here != there and not (math.isnan(here) and math.isnan(there)):
            raise UserError(
                f"{pair}: {one.variant} with seed {one.seed} has other numbers ({name} was "
                f"{here!r}, is {there!r}): leave out one of them, with --seeds in a report of its "
                "own, or train both with the same versions, device and threads"
            )


def refuse_unequal_tuning(comparison: Comparison) -> None:
    """Refuses variants that were tuned with different means, as a comparison is refused.

    Raises:
        UserError: it names the fact.
    """
    for fact, values in unequal_tuning(comparison.tuning, comparison.baseline).items():
        if fact not in comparison.allowed:
            shown = ", ".join(f"{variant}: {value}" for variant, value in values.items())
            raise UserError(f"{fact}: variants are tuned differently ({shown}): not merged")


def tell_unsure(sources: list[Source]) -> None:
    """Warns of other versions and machines, and where it is not known what runs have read."""
    runs = [source.record(run) for source in sources for run in source.comparison.results]
    unknown = sum(not record.exists for record in runs)
    if unknown:
        log.warning(
            "what %d of %d runs have read is not known: it may not be the same files",
            *(unknown, len(runs)),
        )
    for name in ("alignlab", "commit", *CHANGE_BITS):
        values = [source.comparison.environment.get(name) for source in sources]
        shown = list(dict.fromkeys("not recorded" if v is None else str(v) for v in values))
        if len(shown) > 1:
            log.warning("%s: comparisons were made with %s", name, " and with ".join(shown))


def _first_difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    kept = ({k: v for k, v in one.items() if k != BLOCKS} for one in (here, there))
    return first_difference(*kept)


def _kind(comparison: Comparison) -> str:
    return "equal steps" if comparison.budget is None else comparison.budget.label


def _other_steps(here: Comparison, there: Comparison, variant: str) -> str:
    """How many steps a variant's runs took, where it is not the same number."""
    steps = [
        sorted({run.steps for run in one.results if run.variant == variant})
        for one in (here, there)
    ]
    if not all(steps) or steps[0] == steps[1]:
        return ""
    was, now = (", ".join(map(str, counts)) for counts in steps)
    return f"its runs took {was} steps and {now}"


def _refuse_other_inputs(first: Source, other: Source) -> None:
    records = [
        [source.record(run) for run in source.comparison.results] for source in (first, other)
    ]
    for here, there in product(*records):
        here.refuse_differences(there, remedy="they cannot be merged")


def _tell_evaluations(first: Source, other: Source) -> None:
    here, there = (source.base.eval.every for source in (first, other))
    if here != there:
        log.warning(
            "eval.every is %s in %s and %s in %s: steps to target depend on it",
            *(here, first.folder, there, other.folder),
        )


def _numbers(one: RunResult, other: RunResult) -> Iterator[tuple[str, float, float]]:
    """Numbers that both have of what a training decides, by name."""
    yield "steps", one.steps, other.steps
    yield "diverged", one.diverged, other.diverged
    for name in one.metrics.keys() & other.metrics.keys():
        if not quantity(name).cost:
            yield name, one.metrics[name], other.metrics[name]
    for here, there in ((one.curves, other.curves), (one.measured, other.measured)):
        for name in here.keys() & there.keys():
            if quantity(name).cost:
                continue
            points = dict(there[name])
            for step, value in here[name]:
                if step in points:
                    yield f"{name} at step {step}", value, points[step]
