"""What is compared may differ in how it trains, not in how it is measured or tuned.

That holds for the variants of a comparison and for the trials of a sweep alike.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from alignlab.config.data import unknown_name
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, differing_settings
from alignlab.experiments.compare.tuned import is_within
from alignlab.recipe import NUMBERLESS
from alignlab.sampling import guidance_of


def differences(config: CompareConfig) -> dict[str, dict[str, JsonValue]]:
    """Every resolved setting in which two variants differ: dotted name -> variant -> value."""
    return differing_settings({v: config.run(v, config.seeds[0]) for v in config.variants})


def tuning_facts(config: CompareConfig) -> dict[str, dict[str, JsonValue]]:
    """What was spent on tuning each variant, None without a sweep; empty if none has a sweep."""
    if not config.tuned:
        return {}
    tunings = {v: tuning.model_dump(mode="json") for v, tuning in config.tuned.items()}
    names = ("sweep", "trials", "seeds", "steps", "metric", "searched")
    return {
        f"tuning.{name}": {v: tunings[v][name] if v in tunings else None for v in config.variants}
        for name in names
    }


def check_fair(config: CompareConfig) -> None:
    """Refuse variants that are measured differently, or tuned with different means.

    `eval`, `data`, the teacher that tokens are measured against, and the shift of noise levels that
    clips are generated with must be equal, and so must `model.expert`, and with one `model.path`:
    they say at which noise levels a run is measured. So must the number of trials of the sweeps
    that variants come from, and the steps, seeds and metric of a trial. Settings named in
    `allow_differences` may differ. A variant without a sweep has 0 trials; the baseline may have
    none where the sweeps searched nothing but objectives, which it does not have.

    Raises:
        UserError: a setting differs, `allow_differences` names none of these, or a sweep searched
            what no sweep can search (`why_not_searched`), or the steps.
    """
    _check_searched(config)
    unfair = measured_differently(config.runs) | unequal_tuning(
        tuning_facts(config), config.baseline
    )
    for name in config.allow_differences:
        if name not in unfair:
            raise UserError(
                f"allow_differences: {unknown_name('difference', name, unfair)} "
                "(evaluation settings in which variants differ)"
            )
    for setting, values in unfair.items():
        if setting not in config.allow_differences:
            shown = ", ".join(f"{variant}: {value}" for variant, value in values.items())
            how = "tuned" if setting.startswith("tuning.") else "measured"
            raise UserError(
                f"{setting}: variants are {how} differently ({shown}); "
                f"make it equal or allow it: allow_differences: [{setting}]"
            )


def measured_differently(runs: Mapping[str, RunConfig]) -> dict[str, dict[str, JsonValue]]:
    """Every setting in which runs are measured differently: dotted name -> run -> value."""
    measured = {name: run.measured_against for name, run in runs.items()}
    fixed = _fixed(runs.values())
    # what is measured reads no teacher shuffled
    controls = {f"teachers.{alias}.shuffle" for alias in measured.values()}
    differing = {
        k: v
        for k, v in differing_settings(runs).items()
        if is_within(k, fixed) and k not in controls
    }
    if len(set(measured.values())) > 1:
        differing["eval.teacher"] = {**measured}
    shifts = {name: guidance_of(run).shift for name, run in runs.items() if run.eval.generates}
    if len(set(shifts.values())) > 1:
        differing["eval.sample_shift"] = {**shifts}
    return differing


def why_not_searched(key: str, base: RunConfig, trials: Sequence[RunConfig] = ()) -> str:
    """Why a sweep cannot search a setting; empty if it can.

    Args:
        key: dotted name of the setting.
        base: the run that all trials share.
        trials: the base with values of the setting.
    """
    if key == "seed":
        return "every trial trains with the sweep's `seeds`; list there what is to be tried"
    if _is_numberless(key):
        return "changes no number of a trial; remove it"
    unfair = measured_differently(
        {"base": base, **{str(place): trial for place, trial in enumerate(trials)}}
    )
    if unfair or is_within(key, _fixed([base])):
        others = [name for name in unfair if not is_within(name, (key,))]
        what = f" ({others[0]} would differ)" if others else ""
        return (
            f"trials would be measured differently{what}, and their numbers could not be compared; "
            f"remove it, and set {others[0] if others else key} for all trials alike"
        )
    return ""


def _check_searched(config: CompareConfig) -> None:
    """Refuses a variant of a sweep whose trials were not comparable, or that is not taken whole."""
    for variant, tuning in config.tuned.items():
        for key in tuning.searched:
            reason = why_not_searched(key, config.runs[variant])
            if key == "steps":
                reason = "the comparison sets them for all variants alike"
            if reason:
                raise UserError(f"variants.{variant}.from: {tuning.sweep} searched {key}: {reason}")


def _fixed(runs: Collection[RunConfig]) -> tuple[str, ...]:
    """Settings, or sections of them, that say how a run is measured."""
    aliases = {alias for run in runs if (alias := run.measured_against) is not None}
    levels = ("model.expert", "model.path") if any(run.model.expert for run in runs) else ()
    return ("eval", "data", *levels, *(f"teachers.{alias}" for alias in sorted(aliases)))


def _is_numberless(key: str) -> bool:
    here: Any = NUMBERLESS
    for part in key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else here
    return here is True


def unequal_tuning(
    facts: Mapping[str, Mapping[str, JsonValue]], baseline: str
) -> dict[str, dict[str, JsonValue]]:
    """In what variants were tuned differently: fact -> variant -> value.

    Args:
        facts: as `tuning_facts` gives them.
        baseline: it may have no sweep where the sweeps searched nothing but objectives.
    """
    if not facts:
        return {}
    trials = {v: count or 0 for v, count in facts["tuning.trials"].items()}
    searched = [key for keys in facts.get("tuning.searched", {}).values() for key in _keys(keys)]
    if trials[baseline] == 0 and all(key.startswith("objectives.") for key in searched):
        del trials[baseline]
    compared: dict[str, dict[str, JsonValue]] = {"tuning.trials": {**trials}}
    for name in ("tuning.steps", "tuning.seeds", "tuning.metric"):
        compared[name] = {v: value for v, value in facts[name].items() if value is not None}
    return {
        name: values
        for name, values in compared.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def _keys(searched: JsonValue) -> list[str]:
    return [str(key) for key in searched] if isinstance(searched, list) else []
