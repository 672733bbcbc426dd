"""How much each objective counts in a step: weight, schedule, warm-up, gate over noise levels.

Shape letters: B samples of a micro-batch, S of a whole step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from alignlab.errors import UserError
from alignlab.losses.gate import gate_weights, is_normalized, mean_weight
from alignlab.losses.objective import ObjectiveConfig
from alignlab.losses.schedule import (
    Constant,
    PlateauWatch,
    StopAtPlateau,
    warmup_at,
    weight_at,
)
from alignlab.losses.weight import GradientShare, MeasuredWeight
from alignlab.training.step_terms import WATCHED, SampleTerms


class ObjectiveWeights:
    """Knows the objectives' settings, what their plateau schedules have watched, and what was
    measured of the weights that are a share of the flow loss's gradient.

    Args:
        objectives: validated settings by alias.
        total_steps: for how many steps schedules take the training, as of a step; None: unknown.
        device: where plateau schedules and measured weights remember.

    Attributes:
        total_steps: as given.
        watches: by alias of the objectives that a plateau may stop; their owner saves them.
        measured: by alias of the objectives whose weight is measured; likewise.
    """

    def __init__(
        self,
        objectives: Mapping[str, ObjectiveConfig],
        total_steps: Callable[[int], int | None],
        device: torch.device,
    ) -> None:
        self._configs = dict(objectives)
        self.total_steps = total_steps
        self.watches: dict[str, PlateauWatch] = {}
        self.measured: dict[str, MeasuredWeight] = {}
        where = "cpu" if device.type == "mps" else device  # Metal has no float64
        for alias, config in objectives.items():
            if isinstance(config.schedule, StopAtPlateau):
                self.watches[alias] = PlateauWatch(config.schedule).to(where)
            if isinstance(config.weight, GradientShare):
                self.measured[alias] = MeasuredWeight(config.weight).to(where)

    def weight(self, alias: str) -> float | Tensor:
        """An objective's weight, before schedule and warm-up; a scalar if it is measured."""
        weight = self._configs[alias].weight
        if isinstance(weight, GradientShare):
            return self.measured[alias].value.float()
        return weight

    def is_measured(self, alias: str) -> bool:
        """Whether an objective's weight is to be measured in a step that computes it."""
        return alias in self.measured and not self.measured[alias].is_held

    def factors(self, step: int) -> dict[str, float]:
        """What schedule and warm-up make of the weight at a step, of each objective with either."""
        return {
            alias: warmup_at(config.warmup, step)
            * weight_at(
                config.schedule,
                step,
                self.total_steps(step),
                stopped=alias in self.watches and self.watches[alias].stopped,
            )
            for alias, config in self._configs.items()
            if config.warmup or not isinstance(config.schedule, Constant)
        }

    def active(self, step: int) -> list[str]:
        """Aliases of the objectives that a step computes."""
        factors = self.factors(step)
        return [alias for alias in self._configs if factors.get(alias, 1.0) != 0]

    @property
    def reads_whole_step(self) -> bool:
        """Whether a gate is normalized, for which the noise levels of a whole step are needed."""
        return any(is_normalized(config.gate) for config in self._configs.values())

    def gate(self, alias: str, sigma_B: Tensor, step_sigma_S: Tensor | None) -> Tensor:
        """Factor of an objective's loss in each sample at its noise level, (B,).

        Args:
            alias: of the objective.
            sigma_B: of these samples.
            step_sigma_S: of all samples of the step; not read unless the gate is normalized.
        """
        gate = self._configs[alias].gate
        weights_B = gate_weights(gate, sigma_B)
        if not is_normalized(gate):
            return weights_B
        assert step_sigma_S is not None  # of every run that reads it; `GivenClips.check`
        return weights_B / mean_weight(gate, step_sigma_S)

    def after_step(
        self, step: int, terms: SampleTerms, total: Callable[[Tensor], Tensor]
    ) -> dict[str, float | Tensor]:
        """Takes in what a step found, and gives the exact numbers that it used, by log name.

        Args:
            step: optimizer steps done before this one.
            terms: of all its micro-batches on this rank.
            total: adds up a tensor of all ranks.
        """
        factors = self.factors(step)
        row: dict[str, float | Tensor] = dict(self._measure(step, terms, total))
        self.watch(step, terms, total)
        return row | {f"schedule/{alias}": factor for alias, factor in factors.items()}

    def watch(self, step: int, terms: SampleTerms, total: Callable[[Tensor], Tensor]) -> None:
        """Shows plateau schedules what they watch in a step: its mean over the samples of all ranks
        that had something to align.

        Args:
            step: optimizer steps done before this one.
            terms: of all its micro-batches on this rank.
            total: adds up a tensor of all ranks.
        """
        watches = {f"{WATCHED}{alias}": watch for alias, watch in self.watches.items()}
        names = [name for name in watches if name in terms]
        if not names:
            return
        sums, counts = total(terms.sums(names))
        means = sums / counts.clamp_min(1)
        for name, mean, count in zip(names, means, counts, strict=True):
            watches[name].see(step, mean, count > 0)

    def _measure(
        self, step: int, terms: SampleTerms, total: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Takes in what a step's micro-batches found of gradients.

        Returns:
            For the log, `weight/<alias>`, that of this step, before schedule and warm-up; and, in a
            step that was measured, `gradient_share/<alias>`, what it made of the gradients.
        """
        row = {}
        for alias in self.active(step) if self.measured else ():
            if alias not in self.measured:
                continue
            row[f"weight/{alias}"] = self.measured[alias].value
            if alias in terms.squares:
                share = self.measured[alias].see(total(terms.squares[alias]))
                row[f"gradient_share/{alias}"] = share
        return row

    def check_measured(self) -> None:
        """Refuses a weight that was measured to no avail; the same on all ranks.

        Raises:
            UserError: in all steps that were measured, an objective or the flow loss had no
                gradient, or next to none.
        """
        for alias, measured in self.measured.items():
            why = measured.why_useless()
            if why:
                raise UserError(
                    f"objectives.{alias}.weight: {why}; measure more steps or give weight as a "
                    "number, and train under another name, or remove the objective"
                )

    def result(self) -> dict[str, Any]:
        """What a result says of weights that were measured; empty where none was.

        `weights`, by alias: the last `weight`, and in how many `steps` it was measured.
        """
        found = {
            alias: {"weight": float(measured.value), "steps": measured.num_measured}
            for alias, measured in self.measured.items()
        }
        return {"weights": found} if found else {}
