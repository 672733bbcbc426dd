"""The settings of a comparison: several variants of one run, each over the same seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.data import Settings, unknown_name
from alignlab.config.merging import canonical, merge
from alignlab.config.names import check_name
from alignlab.config.parts import Seeds
from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.finding import Finding, refuse_other_variants
from alignlab.experiments.compare.tuned import Tuning, sweep_recipe, tuned_changes, tuning_of
from alignlab.experiments.compare.variants import baseline_notice, checked_variants, shown_variants
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.tune.config import TuneConfig, by_dotted_key
from alignlab.recipe import load_run, numbered_settings, refuse_other_command, to_yaml, validated
from alignlab.stage1.config import Stage1Config

COMPARE_KEYS = ("baseline", "seeds", "variants")
OPTIONAL_COMPARE_KEYS = ("aa", "allow_differences", "budget", "cost", "launch", "finding", "tune")


class CostConfig(Settings):
    """How the cost of a training step is measured, after all runs are trained."""

    rounds: int = Field(default=10, ge=6, le=10_000)
    """Rounds in which a variant and the baseline take a step each. Six are the fewest that give a
    95% interval of their median."""


class CompareConfig(Settings):
    """Several variants of one run, each over the same seeds."""

    base: RunConfig
    """What all variants share."""
    baseline: str
    """The variant against which differences are tested."""
    seeds: Seeds
    """Every variant runs once per seed."""
    allow_differences: tuple[str, ...] = ()
    """Evaluation settings in which variants may differ, by dotted name."""
    launch: LaunchConfig = LaunchConfig()
    """What each run needs of its machine."""
    budget: Literal["steps", "wall_time", "compute"] = "steps"
    """What is equal between variants. `wall_time` and `compute` (FLOPs) set each variant's `steps`
    from the measured cost of its step, so that it gets what the baseline's `steps` cost."""
    cost: CostConfig | None = CostConfig()
    """How the cost of a step is measured; null: it is not. Two models are in memory at a time."""
    aa: bool = False
    """Whether the baseline is trained a second time with every seed, under the name `again`: the
    report then says how far two equal trainings differ."""
    variants: dict[str, dict[str, Any]]
    """What each variant changes in `base`, by dotted key and in order (`config.merging.canonical`);
    `from` names the best.yaml of the sweep that tuned it."""
    runs: dict[str, RunConfig]
    """Each variant applied to `base`, with the first seed; see `run`."""
    tuned: dict[str, Tuning] = Field(default_factory=dict)
    """The sweeps of the variants that have a `from`."""
    finding: Finding | None = None
    """What a paper claims that this comparison checks, if it does. It is part of no run."""
    tune: TuneConfig | None = None
    """How `alignlab tune` tunes the variants before it compares them; no other training reads
    it."""

    @model_validator(mode="after")
    def _baseline_exists(self) -> Self:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline: {unknown_name('variant', self.baseline, self.variants)}")
        return self

    @model_validator(mode="after")
    def _budget_is_measured(self) -> Self:
        if self.budget != "steps" and self.cost is None:
            raise ValueError(f"cost: budget: {self.budget} is set from it; remove cost: null")
        return self

    @model_validator(mode="after")
    def _finding_is_of_the_variants(self) -> Self:
        if self.finding is not None:
            refuse_other_variants(self.finding, self.baseline, self.variants)
        return self

    @model_validator(mode="after")
    def _again_has_a_name(self) -> Self:
        if self.aa:
            check_name(self.again, "the name of the baseline's second training")
            if self.again in self.variants:
                raise ValueError(
                    f"aa: the second training of the baseline is named {self.again}, and so is a "
                    "variant: give the variant another name"
                )
        return self

    @property
    def again(self) -> str:
        """What the baseline's second training is named, which is no variant."""
        return f"{self.baseline}-again"

    @property
    def trained(self) -> tuple[str, ...]:
        """What is trained with every seed, in this order: the variants, and with `aa` `again`."""
        return (*self.variants, *([self.again] if self.aa else []))

    def trained_as(self, name: str) -> str:
        """The variant whose settings a run of that name has: itself, of `again` the baseline."""
        return self.baseline if self.aa and name == self.again else name

    @property
    def name(self) -> str:
        """Folder of the comparison under `output`."""
        return self.base.name

    @property
    def output(self) -> str:
        """Folder of all runs."""
        return self.base.output

    def run(self, variant: str, seed: int) -> RunConfig:
        """The run of one variant, or of `again`, and seed: `<name>/<variant>/seed-<seed>`."""
        name = f"{self.name}/{variant}/seed-{seed}"
        return self.runs[self.trained_as(variant)].model_copy(update={"name": name, "seed": seed})


def load_compare(recipe: str | Path, overrides: list[str] | None = None) -> CompareConfig:
    """The config of a comparison; each variant is applied to the base and validated.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `demo`.
        overrides: `dotted.key=value` strings; those of one variant start with `variants.<name>.`.

    Raises:
        UserError: as `load_run`, when the recipe describes a single run, and when a variant's
            `from` names no best.yaml of a sweep that searched under the comparison's settings.
    """
    mapping = read_recipe(recipe, overrides or [])
    refuse_other_command(recipe, {k: v for k, v in mapping.items() if k != "tune"}, "compare")
    return compare_config(mapping)


def compare_config(recipe: Mapping[str, Any]) -> CompareConfig:
    """As `load_compare`, of a recipe as `read_recipe` gives it.

    Raises:
        UserError: as `load_compare`.
    """
    mapping = dict(recipe)
    missing = [key for key in COMPARE_KEYS if key not in mapping]
    if missing:
        raise UserError(f"{missing[0]}: missing; a comparison needs {', '.join(COMPARE_KEYS)}")
    if "seed" in mapping:
        raise UserError("seed: a comparison reads 'seeds'; remove 'seed'")
    if not mapping["variants"]:
        raise UserError("variants: name at least one variant")
    keys = [key for key in (*COMPARE_KEYS, *OPTIONAL_COMPARE_KEYS) if key in mapping]
    settings = {key: mapping.pop(key) for key in keys}
    base = validated(RunConfig, mapping)
    variants = checked_variants(settings["variants"])
    if "tune" in settings:
        settings["tune"] = by_dotted_key(settings["tune"], variants)
    runs, tuned = {}, {}
    for name, changes in variants.items():
        applied = changes
        if "from" in changes:
            tuned[name], applied = _tuned(name, changes, base)
        runs[name] = validated(RunConfig, merge(mapping, applied), under=f"variants.{name}")
    built = {"variants": variants, "base": base, "runs": runs, "tuned": tuned}
    return validated(CompareConfig, {**settings, **built})


def load_base(recipe: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The run of a recipe: itself, or what the runs of a comparison or a sweep share.

    Raises:
        UserError: as `load_run`, `load_compare` and `load_sweep`.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "variants" in mapping:
        return load_compare(recipe, overrides).base
    if "space" in mapping:
        return load_sweep(recipe, overrides).base
    return load_run(recipe, overrides)


def load_trainings(
    recipe: str | Path, overrides: list[str] | None = None
) -> tuple[list[RunConfig | Stage1Config], LaunchConfig]:
    """What a recipe trains, one config for each way to train, and what each needs of its machine.

    The run or the Stage 1 training itself, or the variants of a comparison; of a sweep it is what
    all trials share.

    Raises:
        UserError: as `load_run`, `load_compare`, `load_sweep` and `load_stage1_run`.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "variants" in mapping:
        comparison = load_compare(recipe, overrides)
        return list(comparison.runs.values()), comparison.launch
    if "space" in mapping:
        sweep = load_sweep(recipe, overrides)
        return [sweep.base], sweep.launch
    if "stage1" in mapping:
        return [validated(Stage1Config, mapping)], LaunchConfig()
    return [load_run(recipe, overrides)], LaunchConfig()


def dump_compare(config: CompareConfig) -> str:
    """The resolved recipe as YAML; loading it again gives an equal config."""
    resolved = config.base.model_dump(mode="json", exclude={"seed"})
    included = {*COMPARE_KEYS, *OPTIONAL_COMPARE_KEYS}
    # as older recipes were written
    if not config.aa:
        included.remove("aa")
    included -= {key for key in ("finding", "tune") if getattr(config, key) is None}
    return to_yaml(resolved | config.model_dump(mode="json", include=included))


def show_variants(config: CompareConfig) -> str:
    """What every variant trains, as comments below the resolved recipe.

    Its objectives, the other sections that not all variants share, and a line if the baseline is
    no plain fine-tuning.
    """
    notice = baseline_notice(config.baseline, config.runs[config.baseline])
    lines = [] if notice is None else [f"note: {notice}"]
    for variant, sections in shown_variants(config.runs).items():
        lines += [f"variant {variant}, resolved:", *to_yaml(sections).splitlines()]
    return "".join(f"# {line}\n" for line in lines)


def differing_settings(runs: Mapping[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """What differs between variants: dotted key -> variant -> value (None where it is not set).

    The seed, and what `recipe_hash` leaves out, are no settings of a variant.
    """
    return differing_values({variant: settings_of(run) for variant, run in runs.items()})


def settings_of(run: RunConfig) -> dict[str, Any]:
    """The settings of a variant that change a number, by dotted key."""
    return {key: value for key, value in numbered_settings(run).items() if key != "seed"}


def differing_values(flat: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What differs between settings by dotted key: key -> variant -> value (None where not set)."""
    keys = sorted({key for settings in flat.values() for key in settings})
    by_key = {key: {variant: flat[variant].get(key) for variant in flat} for key in keys}
    return {
        key: values
        for key, values in by_key.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def _tuned(
    variant: str, changes: Mapping[str, Any], base: RunConfig
) -> tuple[Tuning, dict[str, Any]]:
    """The sweep of a variant with `from`, and its changes with what it takes from there."""
    source, own = changes["from"], {key: v for key, v in changes.items() if key != "from"}
    sweep = load_sweep(sweep_recipe(variant, source), stored=True)
    best, tuning = load_run(source, stored=True), tuning_of(source, sweep)
    differing = differing_settings({"base": base, "best": best})
    taken = tuned_changes(variant, tuning, differing, best, own)
    return tuning, canonical(taken, own)
