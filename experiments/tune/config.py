"""The settings of `alignlab tune`: a section of a comparison's recipe."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from alignlab.config.data import Settings, unknown_name
from alignlab.config.parts import Seeds, Steps
from alignlab.errors import UserError
from alignlab.experiments.sweep.config import (
    MetricConfig,
    Parameter,
    SamplerConfig,
    by_name,
    dotted_space,
)

SEEDS = (1000,)
"""Of trials where a recipe names none: comparisons rarely use it."""


class TuneConfig(Settings):
    """How every variant is tuned before they are compared (`alignlab tune`): each by a sweep of its
    own, all alike but for what is searched."""

    trials: int | None = Field(default=None, ge=1)
    """Trials of each variant; `--trials` gives it as well."""
    seeds: Seeds = SEEDS
    """Every trial trains once with each. None of them may be one of the comparison's."""
    metric: Annotated[MetricConfig, BeforeValidator(by_name)] = MetricConfig(name="val/flow")
    """What is optimised: mean over the seeds."""
    steps: Steps | None = None
    """Steps of a trial's run. Left out: those of the comparison."""
    sampler: Annotated[SamplerConfig, BeforeValidator(by_name)] = SamplerConfig()
    """How the next trial's values are chosen; any but `grid`."""
    space: dict[str, Parameter | None] = Field(default_factory=dict)
    """What is searched in every variant, by dotted key, as `space` of a sweep. `optim.lr` is, from
    a fifth to five times the recipe's, unless it stands here; null takes it out."""
    spaces: dict[str, dict[str, Parameter | None]] = Field(default_factory=dict)
    """By variant, what takes the place of its objectives' default ranges or is searched besides;
    null takes a setting out."""

    @field_validator("sampler")
    @classmethod
    def _trials_can_be_equal(cls, sampler: SamplerConfig) -> SamplerConfig:
        if sampler.name == "grid":
            raise ValueError(
                "a grid has as many trials as points, so variants would not have the same number; "
                "choose tpe, gp, cmaes, random or nsga2"
            )
        return sampler


def by_dotted_key(settings: Any, variants: Iterable[str]) -> Any:
    """The section as it was read, with spaces by dotted key and, in `spaces`, by variant.

    Args:
        settings: of the recipe; validation refuses what is no mapping.
        variants: whose names may have dots.

    Raises:
        UserError: a space of a variant that there is not.
    """
    if not isinstance(settings, Mapping):
        return settings
    found = dict(settings)
    if isinstance(found.get("space"), Mapping):
        found["space"] = dotted_space(found["space"])
    if isinstance(found.get("spaces"), Mapping):
        found["spaces"] = _by_variant(dotted_space(found["spaces"]), list(variants))
    return found


def _by_variant(space: Mapping[str, Any], variants: list[str]) -> dict[str, dict[str, Any]]:
    spaces: dict[str, dict[str, Any]] = {}
    for key, parameter in space.items():
        names = sorted((v for v in variants if key.startswith(f"{v}.")), key=len)
        if not names:
            hint = unknown_name("variant", key.partition(".")[0], variants)
            if key in variants:
                hint = "expected a mapping of dotted keys to what is searched"
            raise UserError(f"tune.spaces.{key}: {hint}")
        spaces.setdefault(names[-1], {})[key[len(names[-1]) + 1 :]] = parameter
    return spaces
