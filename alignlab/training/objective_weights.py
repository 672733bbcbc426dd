"""How much each objective counts in a step: schedule, warm-up, and the gate over noise levels.

Shape letters: B samples of a micro-batch, S of a whole step.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from alignlab.losses.gate import gate_weights, is_normalized, mean_weight
from alignlab.losses.objective import ObjectiveConfig
from alignlab.losses.schedule import (
    Constant,
    PlateauWatch,
    StopAtPlateau,
    warmup_at,
    weight_at,
)
from alignlab.training.step_terms import WATCHED, SampleTerms


class ObjectiveWeights:
    """Knows the objectives' settings and what their plateau schedules have watched.

    Args:
        objectives: validated settings by alias.
        total_steps: for how many steps schedules take the training, as of a step; None: unknown.
        device: where plateau schedules remember.

    Attributes:
        total_steps: as given.
        watches: by alias of the objectives that a plateau may stop; their owner saves them.
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
        for alias, config in objectives.items():
            if isinstance(config.schedule, StopAtPlateau):
                # Metal has no float64
                where = "cpu" if device.type == "mps" else device
                self.watches[alias] = PlateauWatch(config.schedule).to(where)

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
