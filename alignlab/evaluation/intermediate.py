"""Evaluations of a run before its last step: when they are due, and who is told of them.

Every `eval.every` steps the validation loss and the tokens of the blocks are measured, every
`eval.sample_every` steps clips are generated and measured: as at the end of the training, with the
same clips and noise, and under the same names. A step that is due and the last one is evaluated
once, as the last. The numbers are a row of `metrics.jsonl` with their step, the clips lie in
`samples/step-000100/`.

A row follows the checkpoint of its step, if there is one. A run that is killed in between makes up
for it when it is resumed.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignlab.evaluation.evaluate import measure
from alignlab.evaluation.generation import LISTING, num_measured_clips
from alignlab.progress import tell
from alignlab.runs.checkpoint_folders import step_path
from alignlab.runs.metric_rows import evaluations, has_generation, has_validation, read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import Tracker
from alignlab.training.setup import Run

log = logging.getLogger(__name__)

OnEvaluation = Callable[[int, Mapping[str, float]], None]
"""Takes the step of an evaluation and its metrics by name.

It is called in order of step, once the row is written, and by a run that is resumed, or finished
already, first of all for the evaluations that were there: the same step may come again, with the
same numbers.
"""


@dataclass(frozen=True)
class Parts:
    """What an evaluation measures.

    Args:
        validation: the validation loss and the tokens.
        generation: generated clips.
    """

    validation: bool
    generation: bool


def tell_earlier(path: Path, on_evaluation: OnEvaluation | None) -> None:
    """Tells of the evaluations that are in a run's log already, in their order.

    Args:
        path: of `metrics.jsonl` of the run.
        on_evaluation: is told; None: nobody is.

    Raises:
        Exception: what `on_evaluation` raises.
    """
    if on_evaluation is not None:
        for step, metrics in evaluations(read_rows(path)).items():
            on_evaluation(step, metrics)


class IntermediateEvaluations:
    """Evaluates a run while it trains. All ranks call the same methods; rank 0 evaluates.

    Args:
        run: whose state is evaluated.
        folder: of the run; samples go there.
        tracker: takes the rows.
        on_evaluation: is told of every evaluation, on rank 0.
    """

    def __init__(
        self, run: Run, folder: RunFolder, tracker: Tracker, on_evaluation: OnEvaluation | None
    ) -> None:
        self._run = run
        self._folder = folder
        self._tracker = tracker
        self._on_evaluation = on_evaluation

    def is_due(self) -> bool:
        """Whether the step that was taken is to be evaluated now."""
        due = self._due()
        return due.validation or due.generation

    def evaluate(self) -> None:
        """Evaluates what is due; the other ranks wait, or have their part in the model.

        Raises:
            Exception: what `on_evaluation` raises.
        """
        self._evaluate(self._due())

    def catch_up(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Tells of earlier evaluations, and makes up for one that the checkpoint's step lacks.

        Args:
            rows: of the run's log so far.

        Raises:
            Exception: what `on_evaluation` raises.
        """
        earlier = evaluations(rows)
        if self._run.ranks.is_main:
            tell_earlier(self._folder.metrics, self._on_evaluation)
        due, found = self._due(), earlier.get(self._run.state.step, {})
        missing = Parts(
            due.validation and not has_validation(found),
            due.generation and not self._is_generated(found),
        )
        if missing.validation or missing.generation:
            self._evaluate(missing)

    def _is_generated(self, found: Mapping[str, float]) -> bool:
        """Whether clips of the present step were generated; some recipes measure none of them."""
        if num_measured_clips(self._run):
            return has_generation(found)
        return (self._samples() / LISTING).exists()

    def _samples(self) -> Path:
        return step_path(self._folder.samples, self._run.state.step)

    def _due(self) -> Parts:
        config, step = self._run.config, self._run.state.step
        is_between = 0 < step < config.steps
        every, sample_every = config.eval.every, config.eval.sample_every
        return Parts(
            is_between and every is not None and step % every == 0,
            is_between and sample_every is not None and step % sample_every == 0,
        )

    def _evaluate(self, parts: Parts) -> None:
        metrics = self._run.with_model(self._measure, parts)
        self._run.ranks.on_main(self._keep, metrics)

    def _measure(self, parts: Parts) -> dict[str, float]:
        if self._run.ranks.is_main:
            tell(f"evaluation at step {self._run.state.step}")
        return measure(
            self._run,
            self._samples(),
            validation=parts.validation,
            generation=parts.generation,
        )

    def _keep(self, metrics: Mapping[str, float]) -> None:
        step = self._run.state.step
        if not metrics:  # clips were generated, and none is measured
            return
        self._tracker.log(step, metrics)
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            log.warning("step %d: not finite: %s", step, ", ".join(broken))
        if self._on_evaluation is not None:
            self._on_evaluation(step, metrics)
