"""One training, from opening its folder to its evaluation: read it from top to bottom.

`train` opens a run, `Trainer.fit` trains and evaluates it, `Trainer.train_steps` is the loop,
`Trainer.step` the optimizer step, `RunTrainer.losses` the forward pass with its alignment losses.
Stage 1 (`alignlab.stage1.train`) goes through the same loop and step with a trainer of its own.
Shape letters: B batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignlab import interruption
from alignlab.config.parts import TrainingConfig
from alignlab.config.run import RunConfig
from alignlab.distributed.ranks import Ranks, join_ranks
from alignlab.distributed.sharding import check_shards
from alignlab.environment import continued, describe_environment
from alignlab.errors import UserError
from alignlab.evaluation.diagnostics import Diagnosis
from alignlab.evaluation.evaluate import evaluate, flow_of_first_clips
from alignlab.evaluation.generation import num_measured_clips
from alignlab.evaluation.intermediate import IntermediateEvaluations, OnEvaluation, tell_earlier
from alignlab.evaluation.run_warnings import (
    START_FLOW,
    RankWarnings,
    alignment_warnings,
    divergence_warnings,
    nonfinite_warnings,
    sample_warnings,
)
from alignlab.progress import step_progress
from alignlab.runs.checkpoint_folders import step_of
from alignlab.runs.checksums import write_json
from alignlab.runs.code_record import record_code
from alignlab.runs.kept_checkpoints import drop_checkpoints
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.open_folder import open_folder
from alignlab.runs.prolong import SchedulePlan, begin_leg, forget_earlier_ends
from alignlab.runs.run_folder import RunFolder
from alignlab.stage1.compatibility import stage1_digests
from alignlab.tracking import SilentTracker, Tracker, ask
from alignlab.training import checkpoint
from alignlab.training.aligned_samples import AlignedSamples, check_recipe
from alignlab.training.batches import Batch, training_batch
from alignlab.training.checkpoint import TrainState
from alignlab.training.flow_matching import flow_loss, timestep_histogram
from alignlab.training.gradient_share import Outputs
from alignlab.training.init_from import checked_source, start_from
from alignlab.training.measure import PeakMemory, StepClock, logged_costs
from alignlab.training.micro_batches import MicroBatches
from alignlab.training.nonfinite import NonFiniteWatch
from alignlab.training.optim import clip_gradients, set_learning_rate, step_unless, update_ema
from alignlab.training.prefetch import Prefetch
from alignlab.training.save_checkpoint import save_due
from alignlab.training.self_teacher import student_input
from alignlab.training.setup import (
    Caches,
    Run,
    build_run,
    check_ranks_agree,
    check_teachers_and_eval,
)
from alignlab.training.step_terms import Aligned, SampleTerms, StepScalars
from alignlab.training.stopping import Due, Stopping
from alignlab.training.texts_ahead import encode_training_texts

Batches = MicroBatches[Any] | Sequence[Any]


@quiet_libraries()
def train(
    config: RunConfig,
    *,
    caches: Caches | None = None,
    wait: bool = False,
    on_evaluation: OnEvaluation | None = None,
) -> Path:
    """Trains, or resumes, the run `<output>/<name>`, evaluates it and returns its folder.

    A finished run is returned as it is, unless the recipe has more steps: then it is prolonged
    (`alignlab.runs.prolong`). Called in each of several processes that torchrun or
    `accelerate launch` started, it trains one run with all of them; at its end, such a program
    calls `alignlab.distributed.ranks.destroy_process_group`.

    Args:
        config: the recipe.
        caches: encoded clips of earlier runs.
        wait: wait for another command that trains this run; else refuse.
        on_evaluation: is told, on rank 0, of every evaluation before the last step
            (`alignlab.evaluation.intermediate`). What it raises ends the run, which can be resumed.

    Raises:
        UserError: the recipe cannot run here, a loss stopped being finite, another command trains
            the run, or the files that it reads are others than when it began.
    """
    ranks = join_ranks(config.model.precision)
    # refused before any work
    check_recipe(config)
    check_shards(config.model, ranks)
    ranks.micro_batches(config.optim.accumulate, config.optim.batch_size)
    with ExitStack() as locks:
        opened = ranks.on_main(open_folder, config, locks, wait=wait)
        if opened.is_finished:
            ranks.on_main(tell_earlier, opened.folder.metrics, on_evaluation)
            return opened.folder.path
        newest = opened.newest
        if newest is not None and not newest.exists():
            raise UserError(f"{newest} is not on this machine: output must lie where all see it")
        ranks.on_main(ask, config)
        with ExitStack() as held:
            source = checked_source(config, held) if newest is None else None
            run = build_run(config, caches, ranks)
            locks.callback(run.caches.values.flush)
            check_teachers_and_eval(run)
            if source is not None:
                start_from(run.state, run.wan, config, source)
        check_ranks_agree(run)
        first = run.state.step if newest is None else step_of(newest)
        encode_training_texts(run, first)  # before there is an optimizer's state
        if newest is not None:
            checkpoint.restore(run.state, newest, notes=opened.notes)
            check_ranks_agree(run)  # in what each has read
        plan = ranks.on_main(begin_leg, opened.folder, config, run.state.step)
        RunTrainer(run, on_evaluation, plan=plan).fit(opened.folder, newest)
    return opened.folder.path


class Trainer(ABC):
    """The loop and the step of every training; what differs is in the abstract methods.

    Args:
        config: the recipe.
        ranks: this rank and those that train with it.
        state: what the training changes.
        plan: of its schedules; None: it is not prolonged.
    """

    def __init__(
        self,
        config: TrainingConfig,
        ranks: Ranks,
        state: TrainState,
        plan: SchedulePlan | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.state = state
        self.plan = plan or SchedulePlan.of(config)
        self._stopping = Stopping(config, ranks, state)
        self._nonfinite = NonFiniteWatch(ranks)

    def fit(self, folder: RunFolder, newest: Path | None) -> None:
        """Trains from where the state stands to the last step, and evaluates.

        Args:
            folder: of the run; this process holds its lock.
            newest: the checkpoint that the state stands on, if any.

        Raises:
            UserError: a scalar or a weight stopped being finite, or an objective aligned nothing.
        """
        ranks = self.ranks
        self._stopping.saved(newest)
        with (
            interruption.telling(self._stopping.progress),
            self._tracker(folder, resumed=newest is not None) as tracker,
        ):
            ranks.barrier()  # a tracking server may be slow
            with self.prepared(folder, tracker):
                self.train_steps(folder, tracker, newest)
                if ranks.is_main:
                    forget_earlier_ends(folder, self.config, self.plan, self.first_row())
                if ranks.is_main or self.state.is_in_shards:
                    self.finish(folder, tracker)
                if ranks.is_main:
                    drop_checkpoints(folder, self.config)
                ranks.barrier()

    def train_steps(self, folder: RunFolder, tracker: Tracker, newest: Path | None) -> None:
        """The loop: batches, diagnosis, step, log, checkpoint, evaluation.

        The host waits for the device only where a row is logged or a checkpoint is due. What is
        not finite is seen at every step, on the device, and raised there. No signal or clock
        changes which steps have a row. The next batches may be made while a step runs.

        Raises:
            Interrupted: a signal came; there is a checkpoint of the last step.
        """
        config, state, device = self.config, self.state, self.ranks.device
        nonfinite, memory = self._nonfinite, PeakMemory(device)
        clock, note = StepClock(device), ""
        with (
            step_progress(config.name, total=config.steps, done=state.step) as advance,
            interruption.deferred(),
            Prefetch(self.micro_batches, state.step, config, device) as prefetch,
        ):
            self._stopping.saved(newest)
            while state.step < config.steps:
                clock.step_begins()
                batches: Batches = prefetch.take(state.step).within(clock.making_data)
                if self.is_diagnosis_due(state.step):
                    batches = list(batches)
                    with clock.paused(), prefetch.paused():
                        tracker.log(state.step + 1, self.diagnose(batches))
                scalars = self.step(batches)
                due = self._stopping.due()
                if due.in_turn or state.step % config.tracking.log_every == 0:
                    row = {key: float(value) for key, value in scalars.items()}
                    row |= clock.lap() | {"memory/peak_mib": memory.peak_mib()}
                    nonfinite.check_state(state.step, state)
                    nonfinite.raise_if_broken(newest)
                    row |= self.counts()
                    tracker.log(state.step, row)
                    note = f"loss {row['loss/total']:.4f}"
                    if due.saves:
                        newest = self.save(folder, due)
                    clock.restart()
                elif due.saves:
                    nonfinite.check_state(state.step, state)
                    nonfinite.raise_if_broken(newest)
                    with clock.paused():
                        newest = self.save(folder, due)
                if due.signal:
                    raise self._stopping.interrupted(due)
                if self.is_evaluation_due():
                    nonfinite.check_state(state.step, state)
                    nonfinite.raise_if_broken(newest)
                    with clock.paused(), memory.paused(), prefetch.paused():
                        with self._stopping.between_steps(partial(self.save, folder)):
                            self.evaluate_now()
                advance(state.step, note)

    def step(self, batches: Batches) -> StepScalars:
        """One optimizer step, unless something in it is not finite; the host waits for nothing."""
        config, state = self.config, self.state
        set_learning_rate(state.optimizer, config, self.plan, state.step)
        parts: list[SampleTerms] = []
        for batch in batches:
            loss, terms = self.losses(batch)
            state.before_backward(is_last=len(parts) + 1 == len(batches))
            torch.autograd.backward(loss / len(batches))
            parts.append(terms)
            del batch, loss  # before the next one is made
        terms = SampleTerms.joined(parts)
        parameters = list(state.names)
        self.ranks.average_gradients(parameters)
        norm = clip_gradients(parameters, config.optim.grad_clip).to(self.ranks.device)
        finite = terms.finite() | {("grad/norm",): norm.isfinite()[None]}
        for names, finite_K in finite.items():
            self._nonfinite.check(state.step + 1, names, finite_K)
        step_unless(state.optimizer, self._nonfinite.is_broken())
        state.optimizer.zero_grad(set_to_none=True)
        settings = self.after_step(terms) | {"lr": state.optimizer.param_groups[0]["lr"]}
        state.step += 1
        return StepScalars(terms, norm, settings, self.ranks)

    def save(self, folder: RunFolder, due: Due | None = None) -> Path | None:
        """Writes what is due, or a checkpoint; gives the newest checkpoint."""
        path = save_due(self.state, folder, self.ranks, self.config.checkpoint, due)
        if path is not None:
            self._stopping.saved(path)
        return self._stopping.newest

    def first_row(self) -> dict[str, float]:
        """What the log says before the first step that depends on the number of steps."""
        return {}

    def _tracker(self, folder: RunFolder, *, resumed: bool) -> Tracker:
        """Writes `environment.json` and gives the tracker; silent on all ranks but the main one."""
        if not self.ranks.is_main:
            return SilentTracker()
        environment = describe_environment() | {"processes": str(self.ranks.world_size)}
        if resumed:
            environment = continued(folder.path / "environment.json", environment)
        write_json(folder.path / "environment.json", environment)
        record_code(folder.path, step=self.state.step)
        return Tracker(folder, self.config, start=self.state.step, environment=environment)

    @abstractmethod
    def micro_batches(self, step: int | None = None) -> MicroBatches[Any]:
        """This rank's share of a step's samples, on the device; made when they are taken.

        Args:
            step: any, also one that is not yet due; None: the next one.
        """

    @abstractmethod
    def losses(self, batch: Any) -> tuple[Tensor, SampleTerms]:
        """The loss of a micro-batch, and its terms by their log names."""

    @abstractmethod
    def finish(self, folder: RunFolder, tracker: Tracker) -> None:
        """Evaluates; rank 0 writes `result.json`, which marks the run as finished."""

    def prepared(self, folder: RunFolder, tracker: Tracker) -> AbstractContextManager[None]:
        """What is in place while the training runs."""
        return nullcontext()

    def is_diagnosis_due(self, step: int) -> bool:
        """Whether `diagnose` is asked before a step."""
        return False

    def diagnose(self, batches: Sequence[Any]) -> Mapping[str, float]:
        """Looks into the step before it is taken, and leaves the state as it is."""
        return {}

    def is_evaluation_due(self) -> bool:
        """Whether `evaluate_now` is called after the step that was taken."""
        return False

    def evaluate_now(self) -> None:
        """Evaluates before the last step, and leaves the state as it is."""
        raise NotImplementedError

    def after_step(self, terms: SampleTerms) -> dict[str, float | Tensor]:
        """What follows an optimizer step; gives the exact settings that the step used."""
        return {}

    def counts(self) -> dict[str, float]:
        """What a log row says of all steps so far.

        Raises:
            UserError: there is no use in going on.
        """
        return {}


class RunTrainer(Trainer):
    """Flow matching with alignment losses.

    Args:
        run: everything that the run trains with. Enter `run.branch` before taking steps by hand.
        on_evaluation: see `train`.
        plan: of its schedules; None: it is not prolonged.
    """

    config: RunConfig

    def __init__(
        self,
        run: Run,
        on_evaluation: OnEvaluation | None = None,
        *,
        plan: SchedulePlan | None = None,
    ) -> None:
        super().__init__(run.config, run.ranks, run.state, plan)
        self.run = run
        run.alignment.weights.total_steps = self.plan.total_steps
        self._on_evaluation = on_evaluation
        self._evaluations: IntermediateEvaluations | None = None
        self._diagnosis: Diagnosis | None = None
        with_references = run.clips.share_with_references()
        self._aligned = AlignedSamples(run.config, with_references, run.ranks)

    def micro_batches(self, step: int | None = None) -> MicroBatches[Batch]:
        config, alignment, device = self.config, self.run.alignment, self.ranks.device
        step = self.state.step if step is None else step
        shares = self.ranks.micro_batches(config.optim.accumulate, config.optim.batch_size)
        # a diagnosis wants all of them at once: the device may not hold all their features
        reads = alignment.reads(step) if len(shares) == 1 or not self.is_diagnosis_due(step) else ()
        make = partial(training_batch, self.run.clips, config.flow, window=self.run.window)
        make = partial(make, seed=config.seed, step=step, reads=reads)
        if self.run.self_teacher is not None:
            make = partial(make, **self.run.self_teacher.draws)
        if alignment.weights.reads_whole_step:
            make = partial(make, whole=range(config.optim.batch_size))
        return MicroBatches(
            [partial(make, samples=samples) for samples in shares],
            move=partial(Batch.to, device=device),
            completed=partial(
                Batch.completed, reads=reads, needs=alignment.needs(step), device=device
            ),
        )

    def losses(self, batch: Batch) -> tuple[Tensor, SampleTerms]:
        """Flow loss plus alignment of one micro-batch, and every term by its log name."""
        flow_B, aligned, outputs = self.forward(batch)
        weighted_B = self.run.flow_weights(batch.sigma_B) * flow_B
        total_B = weighted_B + aligned.loss_B
        terms = {"loss/total": total_B.detach(), "loss/flow": flow_B.detach()}
        squares = self.run.alignment.gradient_squares(weighted_B, aligned, outputs)
        return total_B.mean(), aligned.sample_terms(terms, squares)

    def forward(self, batch: Batch) -> tuple[Tensor, Aligned, Outputs]:
        """Unweighted flow loss (B,), what the objectives give, what the tapped blocks put out."""
        run = self.run
        teacher = run.self_teacher if run.alignment.is_on(self.state.step, "self") else None
        noisy, tokens_BN = student_input(batch, teacher)
        timesteps_B = batch.sigma_B * 1000
        with run.autocast():
            out = run.branch(
                noisy, timesteps_B, batch.text_BLD, batch.references, tokens_BN=tokens_BN
            )
            own = None if teacher is None else teacher.features(run.branch, batch)
            # projectors run as the transformer does; kernels and frozen networks leave autocast
            aligned = run.alignment.losses(batch, self.state.step, out.taps, own)
        flow_B = flow_loss(out.velocity_BCTHW, batch.latents_BCTHW, batch.noise_BCTHW)
        return flow_B, aligned, out.outputs

    def after_step(self, terms: SampleTerms) -> dict[str, float | Tensor]:
        """Moves the average of the weights; tells schedules and measured weights of the step."""
        update_ema(self.run.state, self.config.optim.ema)
        if self.run.self_teacher is not None:
            self.run.self_teacher.update(self.run.wan.transformer, self.state.step)
        self._aligned.see(terms.values_of)
        return self.run.alignment.weights.after_step(self.state.step, terms, self.ranks.total)

    def counts(self) -> dict[str, float]:
        """Share of samples that had something to align, by objective."""
        self.run.alignment.weights.check_measured()
        return self._aligned.row()

    def train_steps(self, folder: RunFolder, tracker: Tracker, newest: Path | None) -> None:
        """The loop; then, on every rank, whether the objectives had something to align."""
        super().train_steps(folder, tracker, newest)
        self._aligned.check_end()

    def save(self, folder: RunFolder, due: Due | None = None) -> Path | None:
        """As every training does; with what was counted since the last row of the log."""
        self.state.extra = {"aligned": self._aligned.totals()}
        self.run.caches.values.flush()
        return super().save(folder, due)

    @contextmanager
    def prepared(self, folder: RunFolder, tracker: Tracker) -> Iterator[None]:
        """Reference branch and taps; logs the noise levels that the run will draw."""
        if self.state.step == 0:
            flow = self.run.with_model(flow_of_first_clips, self.run)
            tracker.log(0, self.first_row() | {START_FLOW: flow})
        rows = self.ranks.on_main(read_rows, folder.metrics)
        self._aligned.count_on(rows)
        self._aligned.restore(self.state.extra.get("aligned", {}))
        every = self.config.tracking.diagnose_every
        if every is not None:
            self._diagnosis = Diagnosis(self.run, every=every, logged=rows)
        self._evaluations = IntermediateEvaluations(self.run, folder, tracker, self._on_evaluation)
        with self.run.branch:
            self._evaluations.catch_up(rows)
            yield

    def first_row(self) -> dict[str, float]:
        return timestep_histogram(self.config)

    def is_evaluation_due(self) -> bool:
        return self._evaluations is not None and self._evaluations.is_due()

    def evaluate_now(self) -> None:
        assert self._evaluations is not None
        self._evaluations.evaluate()

    def is_diagnosis_due(self, step: int) -> bool:
        return self._diagnosis is not None and self._diagnosis.is_due(step + 1)

    def diagnose(self, batches: Sequence[Batch]) -> dict[str, float]:
        assert self._diagnosis is not None
        return self._diagnosis.scalars(self.state.step + 1, self.weighted_forwards(batches))

    def weighted_forwards(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Aligned]]:
        """Forward passes of the step, one at a time: each holds a graph."""
        for batch in batches:
            flow_B, aligned, _ = self.forward(batch)
            yield self.run.flow_weights(batch.sigma_B) * flow_B, aligned

    def finish(self, folder: RunFolder, tracker: Tracker) -> None:
        metrics = evaluate(self.run, folder.samples)
        flow = flow_of_first_clips(self.run)
        if not self.ranks.is_main:
            return
        metrics |= logged_costs(folder)
        projectors = [p for p in self.run.alignment.parameters() if p.requires_grad]
        metrics["params/extra"] = float(sum(p.numel() for p in projectors))
        tracker.log(self.config.steps, metrics)
        digests = stage1_digests(self.config, self.run.alignment.objectives)
        rows, counts = read_rows(folder.metrics), self._aligned.counts()
        diverged = divergence_warnings(rows, flow)
        notes = [*self.run.notes, *self.state.notes, *diverged, *alignment_warnings(counts)]
        notes += RankWarnings(rows).texts
        notes += sample_warnings(metrics, num_measured_clips(self.run))
        notes += [*nonfinite_warnings(metrics), *self.plan.notes()]
        result = {
            "steps": self.config.steps,
            "metrics": metrics,
            "stage1": digests,
            "aligned": {alias: [count.aligned, count.samples] for alias, count in counts.items()},
            "diverged": bool(diverged),
            "notes": notes,
            **self.run.alignment.weights.result(),
        }
        folder.write_result(result | self.run.own_metrics())
