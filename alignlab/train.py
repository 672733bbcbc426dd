"""One training run: read it from top to bottom in `train`.

Shape letters: B batch.
"""

import json
import statistics
from itertools import islice, product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from alignlab import checkpoint
from alignlab.conditioning import Batch, training_batch
from alignlab.config import RunConfig
from alignlab.environment import describe_environment
from alignlab.evaluate import evaluate
from alignlab.finite import FiniteWatch
from alignlab.flow import draw_sigma, flow_loss, interpolate
from alignlab.memory import PeakMemory
from alignlab.optim import set_learning_rate, update_ema
from alignlab.progress import step_progress
from alignlab.quiet import quiet_libraries
from alignlab.randomness import generator
from alignlab.run import Caches, Run, build_run
from alignlab.run_folder import RunFolder, clear_leftovers, write_text
from alignlab.step_clock import StepClock
from alignlab.tracking import Tracker, read_rows

HISTOGRAM_DRAWS = 10_000


@quiet_libraries()
def train(config: RunConfig, *, caches: Caches | None = None) -> Path:
    """Trains, or goes on with, the run `<output>/<name>`, evaluates it and returns its folder.

    A finished run is returned as it is.

    Raises:
        UserError: the recipe cannot run here, or a loss stopped being finite.
    """
    folder = RunFolder.create(config)
    if folder.read_result() is not None:
        return folder.path
    clear_leftovers(folder.checkpoints)
    run = build_run(config, caches)
    found = checkpoint.latest(folder.checkpoints)
    if found is not None:
        checkpoint.restore(run.state, found)
    environment = describe_environment()
    write_text(folder.path / "environment.json", json.dumps(environment, indent=1))
    with (
        Tracker(folder, config, start=run.state.step, environment=environment) as tracker,
        PeakMemory(run.accelerator.device) as memory,
        run.branch,
    ):
        if run.state.step == 0:
            tracker.log(0, timestep_histogram(config))
        _train_steps(run, folder, tracker, memory, found)
        finish(run, folder, tracker)
    return folder.path


def _train_steps(
    run: Run, folder: RunFolder, tracker: Tracker, memory: PeakMemory, found: Path | None
) -> None:
    """Steps from where the run stands to its last; `found` is the checkpoint that it stands on."""
    config = run.config
    watch, clock = FiniteWatch(run.accelerator.device), StepClock(run.accelerator.device)
    with step_progress(config.name, total=config.steps, done=run.state.step) as advance:
        note = ""
        while run.state.step < config.steps:
            clock.step_begins()
            batches = step_batches(run)
            clock.data_ready()
            scalars = train_step(run, batches)
            done = run.state.step
            watch.check(done, scalars)
            save = done == config.steps or done % config.checkpoint.every == 0
            if save:
                # a finite loss says nothing of the weights that its step left behind
                watch.check(done, {"weights": get_total_norm(list(run.state.names))})
            if save or done % config.tracking.log_every == 0:
                watch.raise_if_broken(found)
                values = {key: float(value) for key, value in scalars.items()}
                values |= clock.lap() | {"memory/peak_mib": memory.peak_mib()}
                tracker.log(done, values)
                note = f"loss {values['loss/total']:.4f}"
                if save:
                    found = checkpoint.save(
                        run.state, folder.checkpoints, keep=config.checkpoint.keep
                    )
                clock.restart()
            advance(done, note)


def step_batches(run: Run) -> list[Batch]:
    """The step's samples, one batch per accumulation round."""
    return [
        training_batch(
            run.clips,
            run.config.flow,
            seed=run.config.seed,
            step=run.state.step,
            samples=samples,
            device=run.accelerator.device,
        )
        for samples in _rounds(run.config)
    ]


def train_step(run: Run, batches: list[Batch]) -> dict[str, Tensor]:
    """One optimizer step; returns its scalars, still on the device."""
    config, state, accelerator = run.config, run.state, run.accelerator
    set_learning_rate(state.optimizer, config, state.step)
    rounds: list[dict[str, Tensor]] = []
    for batch in batches:
        loss, per_sample = batch_loss(run, batch)
        accelerator.backward(loss / len(batches))
        rounds.append(per_sample)
    parameters = list(state.names)
    norm = clip_grad_norm_(parameters, config.optim.grad_clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    update_ema(state, config.optim.ema)
    keys = {key: None for found in rounds for key in found}
    values = {key: torch.cat([found[key] for found in rounds if key in found]) for key in keys}
    scalars = {key: value.mean() for key, value in values.items()}
    used = {f"schedule/{alias}": f for alias, f in run.alignment.factors(state.step).items()}
    used["lr"] = state.optimizer.param_groups[0]["lr"]
    watch_plateaus(run, values)
    state.step += 1
    exact = {key: torch.tensor(value, dtype=torch.float64) for key, value in used.items()}
    return scalars | {"grad/norm": norm} | exact


def watch_plateaus(run: Run, values: dict[str, Tensor]) -> None:
    """Shows each plateau schedule the mean of what it watches over the whole step.

    Args:
        run: at the step that the values are of.
        values: of every sample of this process, over all accumulation rounds.
    """
    for alias, watch in run.alignment.watches.items():
        if watch.stopped:
            continue
        seen = values.get(f"watched/{alias}", torch.zeros(0, device=run.accelerator.device))
        # summed over processes, so that all of them stop at the same step
        total = torch.stack([seen.sum(), torch.ones_like(seen).sum()])
        value, count = run.accelerator.reduce(total, "sum").tolist()
        if count:
            watch.see(run.state.step, value / count)


def batch_loss(run: Run, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow loss plus alignment of one batch, and every term of it by its log name, per sample."""
    noisy = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
    with run.accelerator.autocast():
        out = run.branch(noisy, batch.sigma_B * 1000, batch.text_BLD, batch.references)
    flow_B = flow_loss(out.velocity_BCTHW, batch.latents_BCTHW, batch.noise_BCTHW)
    aligned = run.alignment(out.taps, batch, run.state.step)
    total_B = run.flow_weights(batch.sigma_B) * flow_B + aligned.loss_B
    found = {"loss/total": total_B.detach(), "loss/flow": flow_B.detach()}
    for alias, terms in aligned.terms.items():
        found[f"loss/{alias}"] = terms.loss_B.detach()
        found |= {f"loss/{alias}/{name}": part for name, part in terms.parts.items()}
        rows, similarity_B = aligned.rows[alias], terms.similarity_B
        if similarity_B is not None and rows:
            found[f"sim/{alias}"] = similarity_B[rows]
        if alias in run.alignment.watches and rows:
            watched_B = -terms.loss_B.detach() if similarity_B is None else similarity_B
            found[f"watched/{alias}"] = watched_B[rows]
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
    write_text(folder.result, json.dumps({"steps": run.config.steps, "metrics": metrics}, indent=1))


def timestep_histogram(config: RunConfig) -> dict[str, float]:
    """Share of the noise levels in each tenth of [0, 1], over the run's first 10,000 draws."""
    every = product(range(config.steps), range(config.optim.batch_size))
    addresses = list(islice(every, HISTOGRAM_DRAWS))
    counts = [0] * 10
    for step, sample in addresses:
        sigma = draw_sigma(config.flow, generator(config.seed, "sigma", step, sample))
        counts[min(9, int(sigma * 10))] += 1
    return {f"timesteps/t{i}": count / len(addresses) for i, count in enumerate(counts)}


def _rounds(config: RunConfig) -> list[range]:
    """Which samples of the step's batch each accumulation round handles."""
    size = config.optim.batch_size // config.optim.accumulate
    return [range(i * size, (i + 1) * size) for i in range(config.optim.accumulate)]
