"""The result of a comparison: plain data that every report is built from.

`Comparison.save` and `Comparison.load` are an exact JSON round trip: a report can be rebuilt
without training again (docs/results.md). Numbers that are not finite are written "NaN",
"Infinity", "-Infinity".
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, TypeAdapter, ValidationError

import alignlab
from alignlab.errors import UserError, first_line
from alignlab.experiments.compare.finding import Finding, refuse_other_variants
from alignlab.experiments.compare.own_metrics import OwnMetric, own_quantities
from alignlab.experiments.report.metric_table import Quantity, quantity
from alignlab.passwords import without_passwords
from alignlab.runs.atomic_files import write_text

_CONFIG = ConfigDict(extra="forbid")
QUOTED = ("recipe", "command", "environment", "differing", "tuning")
"""Fields that quote the user, whose URLs lose their passwords."""
SCHEMA = 3
"""Of comparison.json: a field that is added, leaves or means something else makes a new number.
Files of number 1 do not say it."""

# Facts of `Comparison.tuning`: what a variant's sweep searched and found, beside what it cost.
TUNED_SPACE = "tuning.space"
"""By setting, the range in words."""
TUNED_BEST = "tuning.best"
"""By setting, the value of the best trial."""
TUNED_BORDER = "tuning.border"
"""By setting, `lower` or `upper`: the best lies at that end of a range that could be wider."""
TUNED_HISTORY = "tuning.history"
"""The metric of every finished trial, as [trial, value]; of several metrics the first."""
TUNED_DIRECTION = "tuning.direction"
"""`minimize` or `maximize`."""
TUNED = (TUNED_SPACE, TUNED_BEST, TUNED_BORDER, TUNED_HISTORY, TUNED_DIRECTION)

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SampleClip:
    """One generated clip; the same `key` in another run is the same validation prompt.

    Args:
        key: key of the validation sample.
        caption: its text condition.
        video: generated mp4, relative to the run folder.
        real: the data set's own clip as mp4, relative to the run folder.
        references: png files of the reference images, relative to the run folder.
    """

    __pydantic_config__ = _CONFIG

    key: str
    caption: str
    video: str
    real: str | None = None
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """One variant trained with one seed.

    Args:
        variant: name of the variant in the recipe.
        seed: seed of the run.
        steps: optimizer steps taken.
        run_dir: run folder, relative to the folder that the report is written to.
        metrics: final numbers by flat name: `val/flow`, `val/flow/t0` .. `t9`,
            `retrieval/block3`, `time/step` (s), `memory/peak_mib`, `params/extra`, ...
            `experiments/report/metric_table.py` holds their meaning; other names are shown as
            they are.
        curves: scalars over training by name, each as (step, value) in order of step.
        measured: the metrics of a run that was evaluated while it trained (`eval.every`,
            `eval.sample_every`), each as (step, value), with the last step; else empty.
        samples: generated clips.
        notes: warnings of the run, the numbers of each in brackets at its end.
        aligned: by objective, how many samples had something to align, of how many.
        diverged: its validation loss ended far above its start.
    """

    __pydantic_config__ = _CONFIG

    variant: str
    seed: int
    steps: int
    run_dir: str
    metrics: dict[str, float]
    curves: dict[str, Curve]
    samples: tuple[SampleClip, ...] = ()
    notes: tuple[str, ...] = ()
    aligned: dict[str, tuple[int, int]] = field(default_factory=dict)
    diverged: bool = False
    measured: dict[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """A variant's number over the baseline's, measured once for all seeds.

    Args:
        value: the median ratio; 1 for the baseline.
        low, high: interval of the median, at least 95%; None for an exact count.
        beyond: how far from 1 two equal models were seen.
    """

    __pydantic_config__ = _CONFIG

    value: float
    low: float | None = None
    high: float | None = None
    beyond: float = 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """What may be said of the ratio: `low` and `high` moved apart by `beyond`."""
        low = self.value if self.low is None else self.low - self.beyond
        high = self.value if self.high is None else self.high + self.beyond
        return low, high

    @property
    def is_claimed(self) -> bool:
        """Whether a change may be claimed: `interval` excludes 1."""
        low, high = self.interval
        return low > 1.0 or high < 1.0


@dataclass(frozen=True)
class VariantCost:
    """What a training step of one variant costs.

    Args:
        seconds: the baseline's median over all rounds, times the variant's ratio.
        slower: its seconds over the baseline's in the same round.
        flops: of a step, mean over the clips that were timed.
        memory_mib: peak on CUDA with this model alone; None on a CPU.
        parameters: trained ones, projectors included.
    """

    __pydantic_config__ = _CONFIG

    seconds: float
    slower: Ratio
    flops: int
    memory_mib: float | None
    parameters: int


@dataclass(frozen=True)
class Cost:
    """Cost of all variants, measured interleaved in one process (`experiments/compare/cost.py`).

    Args:
        rounds: timed rounds of each variant against the baseline.
        data_steps: steps of the run whose clips were used.
        seed: of the runs that were built.
        device: where it was measured.
        beyond: see `Ratio`.
        variants: by name, the baseline included.
        unknown: operations whose FLOPs could not be counted.
    """

    __pydantic_config__ = _CONFIG

    rounds: int
    data_steps: int
    seed: int
    device: str
    beyond: float
    variants: dict[str, VariantCost]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """Numbers of steps that give every variant the baseline's wall time or compute.

    Args:
        kind: what is equal.
        ratios: cost of a step over that of the baseline's, by variant.
        steps: steps of each variant's runs.
    """

    __pydantic_config__ = _CONFIG

    kind: Literal["wall_time", "compute"]
    ratios: dict[str, float]
    steps: dict[str, int]

    @property
    def label(self) -> str:
        """Such as "equal wall time"."""
        return f"equal {self.kind.replace('_', ' ')}"


@dataclass(frozen=True)
class Comparison:
    """Several variants, each trained with the same seeds.

    Args:
        name: name of the comparison recipe.
        baseline: the variant that differences are taken to.
        seeds: of the recipe, in order.
        variants: names of the variants, in order of the recipe.
        recipe: resolved comparison recipe as YAML.
        differing: every setting in which the resolved recipes of the variants differ, by dotted
            name: its value per variant. A variant that does not have the setting is left out or
            None.
        environment: versions and hardware.
        duration_s: wall-clock seconds of the whole comparison.
        command: command line that started it.
        commit: git commit of alignlab, empty outside a checkout.
        results: one entry per finished run; a run that is missing is shown as missing.
        allowed: evaluation settings in which the recipe lets variants differ.
        cost: of a step of each variant; None where it was not measured.
        budget: of each variant; None for equal steps.
        tuning: of variants that come from a sweep: what was spent on it -> variant -> value, None
            for a variant without a sweep. Empty if no variant comes from one.
        again: runs of the baseline's second training, which is no variant; empty without one.
        finding: the published finding that the recipe checks; None if it checks none.
        own_metrics: of other packages, by their names behind `gen/`; empty without any.
    """

    __pydantic_config__ = _CONFIG

    name: str
    baseline: str
    seeds: tuple[int, ...]
    variants: tuple[str, ...]
    recipe: str
    differing: dict[str, dict[str, JsonValue]]
    environment: dict[str, JsonValue]
    duration_s: float
    command: str
    commit: str
    results: tuple[RunResult, ...]
    allowed: tuple[str, ...] = ()
    cost: Cost | None = None
    budget: Budget | None = None
    tuning: dict[str, dict[str, JsonValue]] = field(default_factory=dict)
    again: tuple[RunResult, ...] = ()
    finding: Finding | None = None
    own_metrics: dict[str, OwnMetric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in QUOTED:  # also those of a file that an older version wrote
            object.__setattr__(self, name, without_passwords(getattr(self, name)))
        if self.baseline not in self.variants:
            raise ValueError(f"baseline {self.baseline!r} is not one of {list(self.variants)}")
        if self.finding is not None:
            refuse_other_variants(self.finding, self.baseline, self.variants)
        seen = set()
        for result in self.results:
            run = (result.variant, result.seed)
            if result.variant not in self.variants or result.seed not in self.seeds:
                raise ValueError(f"run {run} belongs to no variant and seed of {self.name!r}")
            if run in seen:
                raise ValueError(f"run {run} is given twice")
            seen.add(run)
        self._check_again()

    def _check_again(self) -> None:
        names = {result.variant for result in self.again}
        if len(names) > 1 or not names.isdisjoint(self.variants):
            raise ValueError(f"runs {sorted(names)} are no second training of {self.baseline!r}")
        seeds = [result.seed for result in self.again]
        if len(set(seeds)) < len(seeds) or not set(seeds) <= set(self.seeds):
            raise ValueError(f"second training: {seeds} are no distinct seeds of {self.name!r}")

    def run(self, variant: str, seed: int) -> RunResult | None:
        """The run of `variant` with `seed`, or None when it did not finish."""
        for result in self.results:
            if (result.variant, result.seed) == (variant, seed):
                return result
        return None

    def quantity(self, metric: str) -> Quantity:
        """What a metric means here; one of another package as it was when it measured the runs."""
        return quantity(metric, own_quantities(self.own_metrics), self.expert)

    @cached_property
    def expert(self) -> str | None:
        """`model.expert` of the recipe, whose window the bins of the timestep divide."""
        match = re.search(r"^model:\n(?:[ ].*\n)*?  expert: (high|low)$", self.recipe, re.MULTILINE)
        return match[1] if match else None

    def save(self, path: Path) -> None:
        """Write as JSON."""
        content = {"schema": SCHEMA} | _without_nan(dataclasses.asdict(self))
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        # no file holds half a surrogate pair, as names of files may have
        text = re.sub("[\ud800-\udfff]", lambda m: ascii(m[0])[1:-1], text)
        write_text(path, text + "\n", shared=True)

    @staticmethod
    def load(path: Path) -> "Comparison":
        """Read what `save` wrote.

        Raises:
            UserError: no such file, not the JSON of a comparison, or that of a newer version.
        """
        try:
            # not pydantic's reader, which refuses those escapes
            content = json.loads(path.read_bytes())
            _refuse_newer(path, content)
            return _ADAPTER.validate_python(content)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a comparison writes it when it ends") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path}: not a comparison: no JSON: {first_line(error)}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UserError(f"{path}: not a comparison: {where}: {first['msg']}") from None


def _without_nan(content: Any) -> Any:
    """Plain data with the words for numbers that are not finite."""
    match content:
        case float() if not math.isfinite(content):
            return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
        case BaseModel():
            return content.model_dump(mode="json")
        case dict():
            return {key: _without_nan(value) for key, value in content.items()}
        case list() | tuple():
            return [_without_nan(value) for value in content]
    return content


def _refuse_newer(path: Path, content: Any) -> None:
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or schema <= SCHEMA:
        return
    environment = content.get("environment")
    facts = environment if isinstance(environment, dict) else {}
    version, commit = facts.get("alignlab", "a newer version"), content.get("commit")
    writer = f"alignlab {version}{f' (commit {commit})' if commit else ''}"
    raise UserError(
        f"{path}: schema {schema}, and alignlab {alignlab.__version__} reads up to {SCHEMA}: get "
        f"{writer}, which wrote it, or a later one"
    )


def _fields_of(content: Any) -> Any:
    """The fields of a file: without its schema, and without metrics for the summary table.

    Older files hold these, and nothing reads them.
    """
    if not isinstance(content, dict):
        return content
    if type(content.get("schema", 1)) is not int:
        raise ValueError("schema: expected a whole number")
    return {key: value for key, value in content.items() if key not in ("schema", "headline")}


_ADAPTER: TypeAdapter[Comparison] = TypeAdapter(Annotated[Comparison, BeforeValidator(_fields_of)])
