"""Variants may differ in how they train, not in how they are measured or tuned."""

from pydantic import JsonValue

from alignlab.config.data import unknown_name
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, differing_settings
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
    clips are generated with must be equal. So must the number of trials of the sweeps that variants
    come from, and the steps, seeds and metric of a trial. Settings named in `allow_differences` may
    differ. A variant without a sweep has 0 trials; the baseline may have none where the sweeps
    searched nothing but objectives, which it does not have.

    Raises:
        UserError: a setting differs, or `allow_differences` names none of these.
    """
    measured = {v: run.measured_against for v, run in config.runs.items()}
    differing = differences(config)
    if len(set(measured.values())) > 1:
        differing["eval.teacher"] = {**measured}
    shifts = {v: guidance_of(run).shift for v, run in config.runs.items() if _generates(run)}
    if len(set(shifts.values())) > 1:
        differing["eval.sample_shift"] = {**shifts}
    differing |= _unequal_tuning(config)
    teachers = (f"teachers.{alias}." for alias in set(measured.values()))
    fixed = ("eval.", "data.", "tuning.", *teachers)
    for name in config.allow_differences:
        if name not in differing or not name.startswith(fixed):
            valid = [setting for setting in differing if setting.startswith(fixed)]
            raise UserError(
                f"allow_differences: {unknown_name('difference', name, valid)} "
                "(evaluation settings in which variants differ)"
            )
    for setting, values in differing.items():
        if setting.startswith(fixed) and setting not in config.allow_differences:
            shown = ", ".join(f"{variant}: {value}" for variant, value in values.items())
            how = "tuned" if setting.startswith("tuning.") else "measured"
            raise UserError(
                f"{setting}: variants are {how} differently ({shown}); "
                f"make it equal or allow it: allow_differences: [{setting}]"
            )


def _unequal_tuning(config: CompareConfig) -> dict[str, dict[str, JsonValue]]:
    facts = tuning_facts(config)
    if not facts:
        return {}
    trials = {v: config.tuned[v].trials if v in config.tuned else 0 for v in config.variants}
    searched = {key for tuning in config.tuned.values() for key in tuning.searched}
    if trials[config.baseline] == 0 and all(key.startswith("objectives.") for key in searched):
        del trials[config.baseline]
    compared: dict[str, dict[str, JsonValue]] = {"tuning.trials": {**trials}}
    for name in ("tuning.steps", "tuning.seeds", "tuning.metric"):
        compared[name] = {v: value for v, value in facts[name].items() if value is not None}
    return {
        name: values
        for name, values in compared.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def _generates(run: RunConfig) -> bool:
    return bool(run.eval.sample_clips or run.eval.generated_clips)
