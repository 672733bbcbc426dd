"""In how many samples each objective has something to align: what is possible, what is counted.

A sample counts for an objective if it has tokens of the kind that the objective taps (reference
tokens of a picture that is not blank), the objective names it in `Terms.aligned_B`, the gate is
above 0 at its noise level, and its loss is not exactly 0, as that of a teacher which gives zeros or
of a margin that nothing exceeds. Samples of steps in which the schedule is 0 are not asked for.

An objective that aligns nothing trains nothing, with a loss of 0 that looks like success. It is
refused before training where the recipe or the data say so (`check_recipe`, `Alignment.check_data`)
and else stops the run (`AlignedSamples`). With weight 0 an objective is measured and not trained:
nothing is asked of it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from alignlab.config.run import RunConfig
from alignlab.distributed.ranks import Ranks
from alignlab.errors import UserError
from alignlab.losses import OBJECTIVES
from alignlab.losses.gate import NoGate, gate_weights
from alignlab.losses.objective import ObjectiveConfig
from alignlab.losses.schedule import StopAt
from alignlab.losses.weight import GradientShare
from alignlab.models.experts import noise_window
from alignlab.progress import warn_once
from alignlab.training.flow_matching import check_window, representative_levels
from alignlab.training.step_terms import ALIGNED, Aligned

# A run stops once recipe and data let an objective align so many samples, and it aligned none. If
# one in 100 of those has something to align after all, that happens by chance in 4 of 100,000 runs
# (exp(-10)); if one in 10 has, in none that anybody will see (exp(-100)).
STOP_AT_EXPECTED = 1000
# A shorter run that aligned nothing is an error unless that is so likely by chance.
CHANCE = 1e-3
CONSTANT = 0.01  # by how much a gate that counts as constant varies, of its largest value


def trains(objective: ObjectiveConfig) -> bool:
    """Whether the objective changes the training at all."""
    return isinstance(objective.weight, GradientShare) or objective.weight > 0


def check_recipe(config: RunConfig) -> None:
    """Refuses a recipe by which an objective never has anything to align, or no level is drawn.

    Raises:
        UserError: it names objective and setting, or the model has no such expert.
    """
    check_window(config.flow, noise_window(config.model))
    for alias, objective in config.objectives.items():
        if not trains(objective):
            continue
        where = f"objectives.{alias}"
        if _reads_references(objective):
            if config.data.references[1] == 0:
                raise UserError(
                    f"data.references: {list(config.data.references)} leaves {where} nothing to "
                    "align, which reads reference tokens; raise it or remove the objective"
                )
            if not _kept_references(config):
                raise UserError(
                    "flow: reference_dropout + both_dropout is 1: no step keeps a reference, and "
                    f"{where} reads reference tokens; lower them or remove the objective"
                )
        check_starts(alias, objective)
        if not _gate_share(config, objective):
            raise UserError(
                f"{where}.gate: it is 0 at every noise level that flow.sampler="
                f"{config.flow.sampler} draws; widen the gate or remove the objective"
            )


def check_starts(alias: str, objective: ObjectiveConfig) -> None:
    """Refuses a schedule by which an objective never trains a step.

    Raises:
        UserError: it names the setting.
    """
    if isinstance(objective.schedule, StopAt) and objective.schedule.step == 0:
        raise UserError(
            f"objectives.{alias}.schedule: it stops at step 0, before the first step; give a later "
            "step or remove the objective"
        )


def possible_share(config: RunConfig, alias: str) -> float:
    """Share of samples that the recipe lets an objective align: dropout and gate, not the data."""
    objective = config.objectives[alias]
    kept = _kept_references(config) if _reads_references(objective) else 1.0
    return kept * _gate_share(config, objective)


def _reads_references(objective: ObjectiveConfig) -> bool:
    return OBJECTIVES[objective.name].tokens == "reference"


def _kept_references(config: RunConfig) -> float:
    kept = 1.0 - config.flow.reference_dropout - config.flow.both_dropout
    return kept if kept > 1e-9 else 0.0


def _gate_share(config: RunConfig, objective: ObjectiveConfig) -> float:
    """Share of the noise levels of training at which the gate is above 0."""
    return float((_gate_weights(config, objective) > 0).double().mean())


def _gate_weights(config: RunConfig, objective: ObjectiveConfig) -> Tensor:
    """The gate at noise levels of training."""
    levels = representative_levels(config.flow, noise_window(config.model))
    return gate_weights(objective.gate, levels.float())  # a batch's are fp32


def gate_notes(config: RunConfig) -> list[str]:
    """What has to be said of gates that tell no noise level of the trained expert from another."""
    notes = []
    for alias, objective in config.objectives.items():
        if config.model.expert is None or isinstance(objective.gate, NoGate):
            continue
        weights = _gate_weights(config, objective)
        low, high = float(weights.min()), float(weights.max())
        if trains(objective) and high - low <= CONSTANT * high:
            notes.append(
                f"objectives.{alias}.gate: it is {high:.3g} at every noise level that "
                f"model.expert={config.model.expert} is trained at: it only scales the weight; "
                "choose one that varies there, or gate: none"
            )
    return notes


@dataclass(frozen=True)
class AlignedCount:
    """What was counted of one objective.

    Args:
        aligned: samples that had something to align.
        samples: all of the steps in which its schedule was on.
        possible: share of samples that the recipe lets it align.
        is_trained: its weight is above 0.
    """

    aligned: int
    samples: int
    possible: float
    is_trained: bool = True

    @property
    def share(self) -> float:
        """Of the samples, those that had something to align."""
        return self.aligned / max(1, self.samples)

    @property
    def is_missed(self) -> bool:
        """Whether it should train something and has not yet."""
        return self.is_trained and self.samples > 0 and self.aligned == 0


class AlignedSamples:
    """Counts on the device; the host waits for it only where a row is logged.

    Args:
        config: the run.
        with_references: share of the training clips that have a reference.
        ranks: this rank, which counts its own samples, and those that train with it.
    """

    def __init__(self, config: RunConfig, with_references: float, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._with_references = with_references
        self._possible = {alias: possible_share(config, alias) for alias in config.objectives}
        self._totals = {alias: (0, 0) for alias in config.objectives}
        self._lap: dict[str, Tensor] = {}
        self._lap_samples = dict.fromkeys(config.objectives, 0)

    def count_on(self, logged: Sequence[Mapping[str, float]]) -> None:
        """Goes on from the last of the run's rows so far, which are in order."""
        for row in logged:
            for alias in self._totals:
                share, samples = row.get(f"{ALIGNED}{alias}"), row.get(f"{ALIGNED}{alias}/samples")
                if share is not None and samples is not None:
                    self._totals[alias] = round(share * samples), int(samples)

    def totals(self) -> dict[str, list[int]]:
        """Samples with something to align, and all, by alias; waits for the device."""
        return {alias: [count.aligned, count.samples] for alias, count in self.counts().items()}

    def restore(self, totals: Mapping[str, Sequence[int]]) -> None:
        """Goes on from what `totals` gave, which counts steps that have no row as well."""
        for alias, (aligned, samples) in totals.items():
            self._totals[alias] = aligned, samples

    def see(self, terms: Mapping[str, Tensor]) -> None:
        """Takes of a step's terms `aligned/<alias>`, bool (B,) of this rank, of the objectives
        that were on."""
        for alias in self._totals:
            counted_B = terms.get(f"{ALIGNED}{alias}")
            if counted_B is not None:
                count = counted_B.sum()
                self._lap[alias] = self._lap[alias] + count if alias in self._lap else count
                self._lap_samples[alias] += self._config.optim.batch_size

    def row(self) -> dict[str, float]:
        """`aligned/<alias>`, the share since the run began, and `aligned/<alias>/samples`.

        Raises:
            UserError: an objective aligned none of very many samples.
        """
        row = {}
        for alias, count in self.counts().items():
            if not count.samples:
                continue
            if count.is_missed and count.samples * self._likely(alias) >= STOP_AT_EXPECTED:
                raise self._nothing(alias, count)
            row[f"{ALIGNED}{alias}"] = count.share
            row[f"{ALIGNED}{alias}/samples"] = float(count.samples)
        return row

    def check_end(self) -> None:
        """Refuses a finished training in which an objective aligned nothing.

        Raises:
            UserError: and by the recipe and the data it is unlikely to be chance.
        """
        for alias, count in self.counts().items():
            if count.is_missed and (1 - self._likely(alias)) ** count.samples < CHANCE:
                raise self._nothing(alias, count)

    def _likely(self, alias: str) -> float:
        """Share of samples in which recipe and data let an objective align something."""
        reads_references = _reads_references(self._config.objectives[alias])
        return self._possible[alias] * (self._with_references if reads_references else 1.0)

    def counts(self) -> dict[str, AlignedCount]:
        """By alias; waits for the device, and for the other ranks if a step was taken since."""
        if self._lap:
            laps = self._ranks.total(torch.stack(list(self._lap.values()))).tolist()
            for alias, lap in zip(self._lap, laps, strict=True):
                aligned, samples = self._totals[alias]
                self._totals[alias] = aligned + lap, samples + self._lap_samples[alias]
                self._lap_samples[alias] = 0
            self._lap = {}
        return {
            alias: AlignedCount(*self._totals[alias], self._possible[alias], trains(objective))
            for alias, objective in self._config.objectives.items()
        }

    def _nothing(self, alias: str, count: AlignedCount) -> UserError:
        causes = "its teacher gives zeros, or its margins leave a loss of 0"
        if _reads_references(self._config.objectives[alias]):
            causes = f"references are missing or blank (`alignlab data preview`), {causes}"
        else:
            causes = f"masks or saliency are empty, {causes}"
        return UserError(
            f"objectives.{alias}: none of {count.samples:,} samples had anything to align, so it "
            f"trained nothing: {causes}; mend that and train under another name, or remove the "
            "objective"
        )


class AlignedInOwnLoop:
    """Looks, in a training loop that is not alignlab's, whether each objective has ever aligned.

    Which samples it should align is not known there: it may be few of them. The host waits for the
    device once per objective, after `STOP_AT_EXPECTED` samples.

    A rank knows its own samples alone. Where there are several it warns: one that raised would
    leave the others waiting for it, and they need not come to their 1,000 samples in one step.

    Args:
        trained: aliases of the objectives that should train something.
    """

    def __init__(self, trained: Collection[str]) -> None:
        self._aligned: dict[str, Tensor] = {}
        self._samples = dict.fromkeys(trained, 0)
        self._is_sure = dict.fromkeys(trained, False)

    def see(self, aligned: Aligned) -> None:
        """Takes what a step's objectives gave.

        Raises:
            UserError: an objective aligned none of very many samples, and there are no other ranks.
        """
        for alias, counted_B in aligned.counted.items():
            if alias not in self._samples or self._is_sure[alias]:
                continue
            count = counted_B.sum()
            self._aligned[alias] = self._aligned[alias] + count if self._samples[alias] else count
            self._samples[alias] += len(counted_B)
            if self._samples[alias] >= STOP_AT_EXPECTED:
                if not self._aligned[alias]:
                    if _world_size() == 1:
                        raise UserError(self._nothing(alias))
                    warn_once(self._nothing(alias))
                self._is_sure[alias] = True

    def warn(self) -> None:
        """Warns of objectives that have not aligned anything so far; waits for the device."""
        for alias, samples in self._samples.items():
            if samples and not self._is_sure[alias] and not self._aligned[alias]:
                warn_once(self._nothing(alias))

    def _nothing(self, alias: str) -> str:
        here = f" of rank {dist.get_rank()}" if _world_size() > 1 else ""
        return (
            f"objectives.{alias}: none of {self._samples[alias]:,} samples{here} had anything to "
            "align, so it trained nothing: references are missing or blank, masks are empty, the "
            "gate is 0 at every noise level, its teacher gives zeros, or its margins leave a loss "
            "of 0"
        )


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def trained_samples(gate_B: Tensor, loss_B: Tensor, aligned_B: Tensor) -> Tensor:
    """Which of the samples with something to align get a loss, bool (B,); all on one device."""
    return aligned_B & (gate_B > 0) & (loss_B.detach() != 0)
