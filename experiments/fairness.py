"""Variants may differ in how they train, not in how they are measured."""

from pydantic import JsonValue

from alignlab.config import CompareConfig, RunConfig
from alignlab.config_data import unknown_name
from alignlab.errors import UserError
from alignlab.recipe import differing_settings


def differences(config: CompareConfig) -> dict[str, dict[str, JsonValue]]:
    """Every resolved setting in which two variants differ: dotted name -> variant -> value."""
    return differing_settings({v: config.run(v, config.seeds[0]) for v in config.variants})


def check_fair(config: CompareConfig) -> None:
    """Refuse variants that are measured differently.

    `eval`, `data`, and the teacher that tokens are measured against must be equal, but for the
    settings named in `allow_differences`.

    Raises:
        UserError: a setting differs, or `allow_differences` names none of these.
    """
    measured = {v: run.eval.teacher or _first(run) for v, run in config.runs.items()}
    rows = differences(config)
    if len(set(measured.values())) > 1:
        rows["eval.teacher"] = {**measured}
    fixed = ("eval.", "data.", *(f"teachers.{alias}." for alias in set(measured.values())))
    for name in config.allow_differences:
        if name not in rows or not name.startswith(fixed):
            valid = [setting for setting in rows if setting.startswith(fixed)]
            raise UserError(
                f"allow_differences: {unknown_name('difference', name, valid)} "
                "(evaluation settings in which variants differ)"
            )
    for setting, values in rows.items():
        if setting.startswith(fixed) and setting not in config.allow_differences:
            shown = ", ".join(f"{variant}: {value}" for variant, value in values.items())
            raise UserError(
                f"{setting}: variants are measured differently ({shown}); "
                f"make it equal or allow it: allow_differences: [{setting}]"
            )


def _first(run: RunConfig) -> str | None:
    return next(iter(run.teachers), None)
