"""One Stage 1 training: read it from top to bottom in `train_stage1`."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from alignlab.data.registry import build_dataset
from alignlab.distributed.launch_env import refuse_several
from alignlab.distributed.ranks import one_process
from alignlab.environment import continued, describe_environment
from alignlab.errors import UserError
from alignlab.losses.stage1.folder import save_stage1
from alignlab.models.wan import load_text_encoder
from alignlab.randomness import generator
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.run_folder import RunFolder, clear_leftovers, whole_folder, write_text
from alignlab.stage1.checkpoint import Stage1State, restore, save
from alignlab.stage1.config import Stage1Config
from alignlab.stage1.moalign import MoAlignTask
from alignlab.stage1.sara import SaraTask, check_masks
from alignlab.stage1.task import Stage1Task, TaskClips
from alignlab.step_loop import run_steps
from alignlab.teachers import teacher_from
from alignlab.tracking import Tracker, read_rows
from alignlab.training.checkpoint import latest
from alignlab.training.memory import PeakMemory
from alignlab.training.optim import set_learning_rate


@dataclass
class Stage1Run:
    """Everything that a training works with, built once from its recipe."""

    config: Stage1Config
    device: torch.device
    task: Stage1Task[Any]
    state: Stage1State
    clips: TaskClips[Any]
    val_clips: TaskClips[Any]


@quiet_libraries()
def train_stage1(config: Stage1Config) -> Path:
    """Trains, or goes on with, `<output>/<name>`, and returns its subfolder `stage1`.

    That is the folder that a Stage 2 recipe names. A finished training is returned as it is.

    Raises:
        UserError: the recipe cannot run here, or a loss stopped being finite.
    """
    refuse_several()
    folder = RunFolder.create(config)
    if folder.read_result() is not None:
        return folder.stage1
    clear_leftovers(folder.checkpoints)
    clear_leftovers(folder.path)
    run = build_stage1(config)
    found = latest(folder.checkpoints)
    if found is not None:
        restore(run.state, found)
    environment = describe_environment()
    if found is not None:
        environment = continued(folder.path / "environment.json", environment)
    write_text(folder.path / "environment.json", json.dumps(environment, indent=1))
    with (
        Tracker(folder, config, start=run.state.step, environment=environment) as tracker,
        PeakMemory(run.device) as memory,
    ):
        run_steps(
            config,
            run.state,
            run.device,
            tracker,
            memory,
            found,
            draw=lambda: step_clips(run),
            step=lambda clips: train_step(run, clips),
            save=lambda: save(run.state, folder.checkpoints, keep=config.checkpoint.keep),
        )
        finish(run, folder, tracker)
    return folder.stage1


def build_stage1(config: Stage1Config) -> Stage1Run:
    """Loads the frozen models and the data of a recipe, and draws the network's weights."""
    device = one_process("fp32").accelerator.device
    dataset, val_dataset = build_dataset(config.data, "train"), build_dataset(config.data, "val")
    if config.stage1.kind == "sara":
        check_masks(dataset, val_dataset)
    teacher = teacher_from(config.teacher, device=device)
    task: Stage1Task[Any]
    if config.stage1.kind == "sara":
        assert config.model is not None
        text = load_text_encoder(config.model.path, precision=config.model.precision, device=device)
        task = SaraTask(config, teacher, text, device)
    else:
        task = MoAlignTask(config, teacher, device)
    optimizer = torch.optim.AdamW(
        task.network.parameters(),
        lr=config.optim.lr,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
    )
    return Stage1Run(
        config,
        device,
        task,
        Stage1State(task.network, optimizer),
        TaskClips(task, dataset, config.data.cache_clips),
        TaskClips(task, val_dataset, 0),
    )


def step_clips(run: Stage1Run) -> list[Any]:
    """The clips of the step's batch, drawn as those of a Stage 2 run are."""
    config, step = run.config, run.state.step
    rngs = [generator(config.seed, "clip", step, i) for i in range(config.optim.batch_size)]
    return [run.clips[int(torch.randint(len(run.clips), (), generator=rng))] for rng in rngs]


def train_step(run: Stage1Run, clips: list[Any]) -> dict[str, Tensor]:
    """One optimizer step; returns its scalars, still on the device."""
    state = run.state
    set_learning_rate(state.optimizer, run.config, state.step)
    loss, terms = run.task.loss(clips)
    torch.autograd.backward(loss)
    norm = clip_grad_norm_(list(state.names), run.config.optim.grad_clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    rate = state.optimizer.param_groups[0]["lr"]
    return terms | {"grad/norm": norm, "lr": torch.tensor(rate, dtype=torch.float64)}


def finish(run: Stage1Run, folder: RunFolder, tracker: Tracker) -> None:
    """Measures the network, writes `stage1/`, and `result.json`, which marks the run as done."""
    network = run.state.network.eval()
    measured = range(min(run.config.stage1.val_clips, len(run.val_clips)))
    metrics = run.task.evaluate(run.val_clips[i] for i in measured)
    if not all(math.isfinite(value) for value in metrics.values()):
        raise UserError(
            f"the network is not finite after step {run.state.step}: lower optim.lr, "
            f"and remove {folder.path} or choose another name"
        )
    rows = [row for row in read_rows(folder.metrics) if "time/step" in row]
    metrics["time/step"] = statistics.median(row["time/step"] for row in rows)
    metrics["memory/peak_mib"] = max(row["memory/peak_mib"] for row in rows)
    metrics["params/network"] = float(sum(p.numel() for p in network.parameters()))
    tracker.log(run.config.steps, metrics)
    with whole_folder(folder.stage1) as written:
        save_stage1(written, run.task.network, run.task.info())
    result = {"steps": run.config.steps, "metrics": metrics}
    write_text(folder.result, json.dumps(result, indent=1))
