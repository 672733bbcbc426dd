"""One training run: read it from top to bottom in `train`.

Shape letters: B batch.
"""

import json
import statistics
from itertools import islice, product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from alignlab import checkpoint
from alignlab.conditioning import Batch, training_batch
from alignlab.config import RunConfig
from alignlab.diagnose import Diagnosis, RankAlarms
from alignlab.environment import describe_environment
from alignlab.evaluate import evaluate
from alignlab.flow import draw_sigma
from alignlab.forward import forward
from alignlab.memory import PeakMemory
from alignlab.optim import set_learning_rate, update_ema
from alignlab.quiet import quiet_libraries
from alignlab.randomness import generator
from alignlab.run import Caches, Run, build_run
from alignlab.run_folder import RunFolder, clear_leftovers, write_text
from alignlab.stage1.check import is_finished, stage1_digests
from alignlab.step_loop import run_steps
from alignlab.tracking import Tracker, read_rows

HISTOGRAM_DRAWS = 10_000


@quiet_libraries()
def train(config: RunConfig, *, caches: Caches | None = None) -> Path:
    """Trains, or goes on with, the run `<output>/<name>`, evaluates it and returns its folder.

    A finished run is returned as it is.

    Raises:
        UserError: the recipe cannot run here, a loss stopped being finite, or the run is finished
            with another Stage 1 network than its recipe's folder holds now.
    """
    folder = RunFolder.create(config)
    if is_finished(config, folder):
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
        run_steps(
            config,
            run.state,
            run.accelerator.device,
            tracker,
            memory,
            found,
            draw=lambda: step_batches(run),
            step=lambda batches: train_step(run, batches),
            save=lambda: checkpoint.save(
                run.state, folder.checkpoints, keep=config.checkpoint.keep
            ),
            look=diagnosis_of(run, folder, tracker),
        )
        finish(run, folder, tracker)
    return folder.path


def diagnosis_of(run: Run, folder: RunFolder, tracker: Tracker) -> Diagnosis | None:
    """What `tracking.diagnose_every` asks for, if anything."""
    every = run.config.tracking.diagnose_every
    if every is None:
        return None
    return Diagnosis(run, tracker.log, every=every, rows=read_rows(folder.metrics))


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
        values: of this process's samples, over all accumulation rounds.
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
    """Flow loss plus alignment of one batch, and every term of it by its log name, per sample.

    Similarities, and what plateaus watch, are of the samples that had something to align.
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
    return total_B.mean(), {key: values for key, values in found.items() if len(values)}


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
    notes = RankAlarms(rows).notes
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


def _rounds(config: RunConfig) -> list[range]:
    """Which samples of the step's batch each accumulation round handles."""
    size = config.optim.batch_size // config.optim.accumulate
    return [range(i * size, (i + 1) * size) for i in range(config.optim.accumulate)]
