"""One training run: read it from top to bottom in `train`.

Shape letters: B batch.
"""

import json
import statistics
from contextlib import ExitStack
from itertools import islice, product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from alignlab.config.run import RunConfig
from alignlab.distributed.ranks import Processes, join_processes
from alignlab.distributed.replicas import check_replicas
from alignlab.environment import continued, describe_environment
from alignlab.errors import UserError
from alignlab.evaluation.diagnostics import Diagnosis
from alignlab.evaluation.evaluate import evaluate
from alignlab.evaluation.generation import num_measured_clips
from alignlab.evaluation.run_warnings import RankWarnings, sample_warnings
from alignlab.forward import forward
from alignlab.randomness import generator
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.one_writer import only_writer
from alignlab.runs.run_folder import RunFolder, clear_leftovers, write_text
from alignlab.stage1.compatibility import is_finished, stage1_digests
from alignlab.step_loop import run_steps
from alignlab.tracking import SilentTracker, Tracker, read_rows
from alignlab.training import checkpoint
from alignlab.training.batches import Batch, training_batch
from alignlab.training.flow_matching import draw_sigma
from alignlab.training.memory import PeakMemory
from alignlab.training.optim import set_learning_rate, update_ema
from alignlab.training.setup import Caches, Run, build_run

HISTOGRAM_DRAWS = 10_000


@quiet_libraries()
def train(config: RunConfig, *, caches: Caches | None = None, wait: bool = False) -> Path:
    """Trains, or goes on with, the run `<output>/<name>`, evaluates it and returns its folder.

    A finished run is returned as it is. Called in each of several processes that torchrun or
    `accelerate launch` started, it trains one run with all of them; at its end, such a program
    calls `alignlab.distributed.ranks.leave`.

    Args:
        config: the recipe.
        caches: encoded clips of earlier runs.
        wait: wait for another command that trains this run; else refuse.

    Raises:
        UserError: the recipe cannot run here, a loss stopped being finite, another command trains
            the run, or the run is finished with another Stage 1 network than its recipe's folder
            holds now.
    """
    processes = join_processes(config.model.precision)
    processes.share(config.optim.accumulate, config.optim.batch_size)  # refused before any work
    with ExitStack() as held:
        folder, finished, found = processes.on_main(lambda: open_run(config, held, wait=wait))
        if finished:
            return folder.path
        if found is not None and not found.exists():
            raise UserError(f"{found} is not on this machine: output must lie where all see it")
        run = build_run(config, caches, processes)
        if found is not None:
            checkpoint.restore(run.state, found)
        check_replicas(run)
        go_on(run, folder, found)
    return folder.path


def open_run(
    config: RunConfig, held: ExitStack, *, wait: bool
) -> tuple[RunFolder, bool, Path | None]:
    """The run's folder, whether the run is finished, and its newest checkpoint.

    Args:
        config: the recipe.
        held: keeps the lock of a folder that will be written.
        wait: for another command that trains this run; else refuse.
    """
    folder = RunFolder.create(config)
    if not folder.result.exists():
        held.enter_context(only_writer(folder.path, wait=wait))
        clear_leftovers(folder.checkpoints)
    return folder, is_finished(config, folder), checkpoint.latest(folder.checkpoints)


def go_on(run: Run, folder: RunFolder, found: Path | None) -> None:
    """Trains from where the run stands, on the checkpoint `found` if any, to its result."""
    config, processes = run.config, run.processes
    tracker: Tracker = SilentTracker()
    if processes.is_main:
        environment = describe_environment() | {"processes": str(processes.count)}
        if found is not None:
            environment = continued(folder.path / "environment.json", environment)
        write_text(folder.path / "environment.json", json.dumps(environment, indent=1))
        tracker = Tracker(folder, config, start=run.state.step, environment=environment)
    with tracker, PeakMemory(run.accelerator.device) as memory, run.branch:
        processes.wait()  # a tracking server may be slow
        if run.state.step == 0:
            tracker.log(0, timestep_histogram(config))
        run_steps(
            config,
            run.state,
            run.accelerator.device,
            tracker,
            memory,
            found,
            draw=lambda: step_batches(run),
            step=lambda batches: train_step(run, batches),
            save=lambda: save(run, folder),
            look=diagnosis_of(run, folder, tracker),
        )
        if processes.is_main:
            finish(run, folder, tracker)
        processes.wait()


def save(run: Run, folder: RunFolder) -> Path:
    """Writes a checkpoint, of weights that all processes agree on."""
    state = run.state
    if run.processes.count > 1:
        norm = float(get_total_norm(list(state.names)))
        run.processes.check_same("the norm of the trained weights", norm)
    if run.processes.is_main:
        checkpoint.save(state, folder.checkpoints, keep=run.config.checkpoint.keep)
    run.processes.wait()  # here: the group that averages gradients has less patience
    return checkpoint.step_path(folder.checkpoints, state.step)


def diagnosis_of(run: Run, folder: RunFolder, tracker: Tracker) -> Diagnosis | None:
    """What `tracking.diagnose_every` asks for, if anything."""
    every = run.config.tracking.diagnose_every
    if every is None:
        return None
    rows = read_rows(folder.metrics) if run.processes.is_main else []
    return Diagnosis(run, tracker.log, every=every, logged=rows)


def step_batches(run: Run) -> list[Batch]:
    """This process's share of the step's samples, one batch per accumulation round."""
    return [
        training_batch(
            run.clips,
            run.config.flow,
            seed=run.config.seed,
            step=run.state.step,
            samples=samples,
            device=run.accelerator.device,
        )
        for samples in run.processes.share(run.config.optim.accumulate, run.config.optim.batch_size)
    ]


def train_step(run: Run, batches: list[Batch]) -> dict[str, Tensor]:
    """One optimizer step; returns its scalars, still on the device."""
    config, state = run.config, run.state
    set_learning_rate(state.optimizer, config, state.step)
    rounds: list[dict[str, Tensor]] = []
    for batch in batches:
        loss, per_sample = batch_loss(run, batch)
        torch.autograd.backward(loss / len(batches))
        rounds.append(per_sample)
    parameters = list(state.names)
    average_gradients(run.processes, parameters)
    norm = clip_grad_norm_(parameters, config.optim.grad_clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    update_ema(state, config.optim.ema)
    keys = {key: None for found in rounds for key in found}
    values = {key: torch.cat([found[key] for found in rounds if key in found]) for key in keys}
    scalars = run.processes.means(values)
    used = {f"schedule/{alias}": f for alias, f in run.alignment.factors(state.step).items()}
    used["lr"] = state.optimizer.param_groups[0]["lr"]
    watch_plateaus(run, scalars)
    state.step += 1
    exact = {key: torch.tensor(value, dtype=torch.float64) for key, value in used.items()}
    return scalars | {"grad/norm": norm} | exact


def average_gradients(processes: Processes, parameters: list[nn.Parameter]) -> None:
    """Makes every process step with the gradient of the whole batch."""
    gradients = [parameter.grad for parameter in parameters]
    processes.average(gradients, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def watch_plateaus(run: Run, scalars: dict[str, Tensor]) -> None:
    """Shows each plateau schedule the mean of what it watches over the whole step."""
    for alias, watch in run.alignment.watches.items():
        seen = scalars.get(f"watched/{alias}")
        if seen is not None and not watch.stopped:
            watch.see(run.state.step, float(seen))


def batch_loss(run: Run, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow loss plus alignment of one batch, and every term of it by its log name, per sample.

    Similarities, and what plateaus watch, are of the samples that had something to align: (0,) if
    none had, so that all processes have the same names.
    """
    flow_B, aligned = forward(run, batch)
    total_B = run.flow_weights(batch.sigma_B) * flow_B + aligned.loss_B
    found = {"loss/total": total_B.detach(), "loss/flow": flow_B.detach()}
    for alias, terms in aligned.terms.items():
        found[f"loss/{alias}"] = terms.loss_B.detach()
        found |= {f"loss/{alias}/{name}": part for name, part in terms.parts.items()}
        counted_B, similarity_B = aligned.samples[alias], terms.similarity_B
        if similarity_B is not None:
            found[f"sim/{alias}"] = similarity_B[counted_B]
        if alias in run.alignment.watches:
            watched_B = -terms.loss_B.detach() if similarity_B is None else similarity_B
            found[f"watched/{alias}"] = watched_B[counted_B]
    return total_B.mean(), found


def finish(run: Run, folder: RunFolder, tracker: Tracker) -> None:
    """Evaluates the trained model and writes `result.json`, which marks the run as finished."""
    metrics = evaluate(run, folder)
    rows = read_rows(folder.metrics)
    for key in ("time/step", "memory/peak_mib"):
        values = [row[key] for row in rows if key in row]
        metrics[key] = statistics.median(values) if key == "time/step" else max(values)
    projectors = [p for p in run.alignment.parameters() if p.requires_grad]
    metrics["params/extra"] = float(sum(p.numel() for p in projectors))
    tracker.log(run.config.steps, metrics)
    used = stage1_digests(run.config, run.alignment.objectives)
    notes = RankWarnings(rows).texts + sample_warnings(metrics, num_measured_clips(run))
    result = {"steps": run.config.steps, "metrics": metrics, "stage1": used, "notes": notes}
    write_text(folder.result, json.dumps(result, indent=1))


def timestep_histogram(config: RunConfig) -> dict[str, float]:
    """Share of the noise levels in each tenth of [0, 1], over the run's first 10,000 draws."""
    every = product(range(config.steps), range(config.optim.batch_size))
    addresses = list(islice(every, HISTOGRAM_DRAWS))
    counts = [0] * 10
    for step, sample in addresses:
        sigma = draw_sigma(config.flow, generator(config.seed, "sigma", step, sample))
        counts[min(9, int(sigma * 10))] += 1
    return {f"timesteps/t{i}": count / len(addresses) for i, count in enumerate(counts)}
