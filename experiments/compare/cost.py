"""What a training step of each variant costs, measured interleaved in one process.

The time that a run logs depends on what else the machine did while it trained. Here the baseline
and one variant at a time are built anew, outside any run folder, and take steps in turn on the same
clips; the order within a round alternates. A second copy of the baseline is measured in the same
way: what it differs by is no cost of a loss, and no smaller difference is claimed.
"""

import gc
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError
from scipy import stats

from alignlab.config.data import CacheConfig
from alignlab.config.identity import settings_hash
from alignlab.config.run import RunConfig
from alignlab.environment import describe_environment, processor_name
from alignlab.experiments.compare.config import CompareConfig
from alignlab.experiments.compare.measure import seconds_of
from alignlab.experiments.compare.result import Cost, Ratio, VariantCost
from alignlab.experiments.launchers.local import threads
from alignlab.experiments.launchers.same_code import code_facts
from alignlab.plan.flops import count_flops
from alignlab.progress import step_progress
from alignlab.recipe import NUMBERLESS
from alignlab.runs.checksums import DamagedError, read_json, write_json
from alignlab.runs.log_filters import quiet_libraries
from alignlab.train import RunTrainer
from alignlab.training.batches import Batch
from alignlab.training.measure import PeakMemory
from alignlab.training.setup import Caches, build_run, shared_caches
from alignlab.units import MIB

DATA_STEPS = 4
"""The clips and noise levels of the run's first steps, over and over: all sides see the same."""
CONFIDENCE = 0.95
MIN_VALUES = 6  # fewer give no interval of a median at this confidence
COPY = "a copy of the baseline"
# Settings that no step that is timed depends on: each is taken as the first of the training, where
# no schedule has begun to move. The seed is none of them: it draws the clips, of which some have
# more references, and the conditions that are dropped.
NO_COST = NUMBERLESS | {"steps": True, "eval": True}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _CostFile:
    """`cost.json`: what was measured, and what has to be equal for it to be used again."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    key: dict[str, JsonValue]
    cost: Cost


_COST_FILE = TypeAdapter(_CostFile)


def cost_of(config: CompareConfig, folder: Path) -> Cost | None:
    """Cost of a comparison's variants: read from `folder`/cost.json, or measured and kept there.

    A kept cost is used again if variants, rounds, first seed, code and hardware are the same: how
    long the runs are and how they are evaluated is no matter.

    Returns:
        None where the recipe says `cost: null`, or where baseline and variant do not fit into
        memory together; the latter is logged.

    Raises:
        UserError: a run cannot be built, or cost.json is not what this wrote.
    """
    if config.cost is None:
        return None
    # as the runs are trained
    with threads(config.launch.cpus):
        return _read_or_measured(config, folder / "cost.json")


def _read_or_measured(config: CompareConfig, path: Path) -> Cost | None:
    key = _key(config)
    if path.exists():
        fix = "copy it back from elsewhere, or remove it: the cost is then measured again"
        content = read_json(path, fix=fix)
        try:
            kept = _COST_FILE.validate_json(json.dumps(content))
        except ValidationError:
            raise DamagedError(path, "it holds no measured cost", fix) from None
        if kept.key == key:
            return kept.cost
    try:
        cost = measure_cost(config)
    except torch.OutOfMemoryError:
        log.warning(
            "cost: not measured: the baseline and a variant do not fit into memory together; "
            "set cost=null to leave it out"
        )
        return None
    write_json(path, _COST_FILE.dump_python(_CostFile(key, cost), mode="json"))
    return cost


def _key(config: CompareConfig) -> dict[str, JsonValue]:
    assert config.cost is not None
    facts = describe_environment()
    runs = {v: settings_hash(config.run(v, config.seeds[0]), NO_COST) for v in config.variants}
    return {
        "rounds": config.cost.rounds,
        "baseline": config.baseline,
        "runs": {**runs},
        "files": code_facts()["files"],  # a commit with changes does not say which
        "processor": processor_name(),
        **{name: facts[name] for name in ("device", "threads", "torch")},
    }


@quiet_libraries()
def measure_cost(config: CompareConfig) -> Cost:
    """Measures every variant against the baseline, with the first seed and all objectives on.

    Two models are in memory at a time. No run folder is read or written.

    Raises:
        ValueError: the recipe says `cost: null`.
        UserError: a run cannot be built.
        torch.OutOfMemoryError: two of them do not fit into memory.
    """
    if config.cost is None:
        raise ValueError("cost: null in the recipe")
    rounds, caches = config.cost.rounds, dict[str, Caches]()
    runs = {v: config.run(v, config.seeds[0]) for v in config.variants}
    base = _Side(runs[config.baseline], caches)
    measured = {config.baseline: (base.alone(), Ratio(1.0))}
    others = {COPY: runs[config.baseline]}
    others |= {v: run for v, run in runs.items() if v != config.baseline}
    base_seconds, beyond = list[float](), 0.0
    for name, run in others.items():
        alone, pairs = _beside(base, name, run, caches, rounds)
        base_seconds += [first for first, _ in pairs]
        ratio = _ratio(pairs, beyond)
        if name == COPY:
            beyond = _distance(ratio)
        else:
            measured[name] = (alone, ratio)
    seconds = statistics.median(base_seconds)
    return Cost(
        rounds=rounds,
        data_steps=DATA_STEPS,
        seed=config.seeds[0],
        device=str(describe_environment()["device"]),
        beyond=beyond,
        variants={v: _variant_cost(seconds, *measured[v]) for v in config.variants},
        unknown=tuple(sorted({name for alone, _ in measured.values() for name in alone.unknown})),
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an interval that holds the median with at least 95% confidence.

    They are two of the values themselves (order statistics), so nothing is assumed of how the
    values are distributed but that they are independent.

    Raises:
        ValueError: fewer than six values, of which no interval is that sure.

    >>> median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    (1.0, 6.0)
    """
    if len(values) < MIN_VALUES:
        raise ValueError(
            f"{len(values)} values: it takes {MIN_VALUES} for an interval of their median"
        )
    interval = stats.quantile_test(values, p=0.5).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class _Alone:
    """What a side needs, whatever the other does; its fields are those of `VariantCost`."""

    flops: int
    unknown: frozenset[str]
    memory_mib: float | None
    parameters: int


class _Side:
    """A run that only takes steps: clips of the first steps, every objective at work."""

    def __init__(self, config: RunConfig, caches: dict[str, Caches]) -> None:
        self._resident = _allocated()
        # what a teacher costs is part of what an objective costs
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"cache": CacheConfig(mode="off")})}
        )
        self._run = build_run(config, shared_caches(config, caches))
        self._trainer = RunTrainer(self._run)
        self._device = self._run.device
        for weight in self._run.alignment.weights.measured.values():
            weight.hold()  # as in all but the first steps of a training

    def alone(self) -> _Alone:
        """Operations, mean over the clips that are timed, and on CUDA the peak memory."""
        total, unknown = 0, frozenset[str]()
        memory = PeakMemory(self._device)
        with self._run.branch:
            self._step(self._batches(0))
            for number in range(DATA_STEPS):
                count = count_flops(partial(self._step, self._batches(number)))
                total, unknown = total + count.total, unknown | count.unknown
            peak = None
            if self._device.type == "cuda":
                peak = memory.peak_mib() - self._resident
        parameters = sum(p.numel() for p in self._run.state.names)
        return _Alone(round(total / DATA_STEPS), unknown, peak, parameters)

    def seconds(self, number: int) -> float:
        """Seconds of a step whose clips are in memory."""
        batches = self._batches(number % DATA_STEPS)
        with self._run.branch:
            return seconds_of(partial(self._step, batches), self._device)

    def _batches(self, number: int) -> list[Batch]:
        self._run.state.step = number
        return list(self._trainer.micro_batches())

    def _step(self, batches: list[Batch]) -> None:
        # at the first step no schedule has turned its objective off
        self._run.state.step = 0
        for watch in self._run.alignment.weights.watches.values():
            watch.wait_anew()
        self._trainer.step(batches)


def _beside(
    base: _Side, name: str, run: RunConfig, caches: dict[str, Caches], rounds: int
) -> tuple[_Alone, list[tuple[float, float]]]:
    """Builds the other side, measures it alone and in turn with the baseline, and forgets it."""
    other = _Side(run, caches)
    alone, pairs = other.alone(), _interleaved(name, base, other, rounds)
    del other
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return alone, pairs


def _interleaved(name: str, base: _Side, other: _Side, rounds: int) -> list[tuple[float, float]]:
    """Seconds of both sides in each round, after one round that is not counted."""
    pairs = []
    with step_progress(f"cost of {name}", total=rounds + 1) as advance:
        for number in range(rounds + 1):
            sides = (base, other) if number % 2 else (other, base)
            taken = {side: side.seconds(number) for side in sides}
            pairs.append((taken[base], taken[other]))
            advance(number + 1, "")
    return pairs[1:]


def _ratio(pairs: Sequence[tuple[float, float]], beyond: float) -> Ratio:
    ratios = [second / first for first, second in pairs]
    low, high = median_interval(ratios)
    return Ratio(statistics.median(ratios), low, high, beyond)


def _distance(ratio: Ratio) -> float:
    """How far from 1 the interval of a ratio reaches."""
    assert ratio.low is not None and ratio.high is not None
    return max(abs(ratio.low - 1.0), abs(ratio.high - 1.0))


def _variant_cost(base_seconds: float, alone: _Alone, ratio: Ratio) -> VariantCost:
    # the machine may have been faster when this variant had its turn; its ratio does not show that
    seconds = base_seconds * ratio.value
    return VariantCost(seconds, ratio, alone.flops, alone.memory_mib, alone.parameters)


def _allocated() -> float:
    """MiB that other models hold on the GPU, 0 on a CPU."""
    return torch.cuda.memory_allocated() / MIB if torch.cuda.is_available() else 0.0
