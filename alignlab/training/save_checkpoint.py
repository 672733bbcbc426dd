"""A checkpoint of weights that all ranks agree on, written by rank 0, or by all of them.

Of a transformer in shards, rank 0 gathers weights and their average, and writes them where and as a
run of one process does: whatever reads a checkpoint reads these. Of the optimizer's state, which is
twice as much, every rank writes its part.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from alignlab.config.parts import CheckpointConfig
from alignlab.distributed.ranks import Ranks
from alignlab.distributed.sharding import total_norm, whole_tensors
from alignlab.runs.atomic_files import whole_folder
from alignlab.runs.checkpoint_folders import (
    OPTIMIZER_SHARDS,
    copy_path,
    prune,
    remove_replaced,
    step_path,
)
from alignlab.runs.kept_checkpoints import keep_weights_of
from alignlab.runs.metric_rows import LogMark, mark_log
from alignlab.runs.run_folder import RunFolder
from alignlab.training import checkpoint
from alignlab.training.checkpoint import RunState, TrainState, save_lora, write_facts
from alignlab.training.optimizer_shards import write_shards
from alignlab.training.stopping import Due


def save_due(
    state: TrainState,
    folder: RunFolder,
    ranks: Ranks,
    settings: CheckpointConfig,
    due: Due | None = None,
) -> Path | None:
    """Writes a checkpoint, or the weights of a step alone; all ranks wait until it is written.

    Args:
        state: what is written.
        folder: of the run; where the state is in shards, all ranks see it.
        ranks: that train it.
        settings: which older checkpoints are kept.
        due: what is written; None: a checkpoint.

    Returns:
        The checkpoint, if one was due.

    Raises:
        UserError: the ranks do not hold the same weights, or another one could not write.
    """
    if ranks.world_size > 1:
        norm = float(total_norm(list(state.names)))
        ranks.check_same("the norm of the trained weights", norm)
    is_checkpoint = due is None or due.checkpoint
    path = (step_path if is_checkpoint else copy_path)(folder.checkpoints, state.step)
    log = mark_log(folder.metrics) if ranks.is_main and is_checkpoint else None
    if isinstance(state, RunState) and state.is_in_shards:
        _write_shards(state, path, ranks, log, weights_only=not is_checkpoint)
    elif ranks.is_main:
        checkpoint.write(state, path, log, weights_only=not is_checkpoint)
    if ranks.is_main and is_checkpoint:
        if due is not None and due.weights:
            keep_weights_of(path)
        remove_replaced(folder.checkpoints, state.step)
        prune(folder.checkpoints, settings.keep, settings.keep_every)
    ranks.barrier()  # here: the group that averages gradients has a shorter timeout
    return path if is_checkpoint else None


def _write_shards(
    state: RunState, target: Path, ranks: Ranks, log: LogMark | None, *, weights_only: bool
) -> None:
    """`alignlab.training.checkpoint.write` by all ranks."""
    with ExitStack() as stack:
        folder = ranks.on_main(stack.enter_context, whole_folder(target))
        _write_weights(state, folder, ranks)
        if not weights_only:
            write_shards(state.optimizer, state.names, folder / OPTIMIZER_SHARDS, ranks.group)
        if ranks.is_main:
            write_facts(state, folder, log)


def _write_weights(state: RunState, folder: Path, ranks: Ranks) -> None:
    """`RunState.write_weights` by rank 0, of what all ranks hold."""
    state.put_back()
    transformer, is_main = state.transformer, ranks.is_main
    own = get_peft_model_state_dict(transformer) if state.is_lora else transformer.state_dict()
    weights = whole_tensors(own, kept=is_main)
    if is_main and state.is_lora:
        save_lora(transformer, folder, weights)
    elif is_main:
        with torch.device("meta"):  # `transformer` is of a class that fully_shard has made
            plain = WanTransformer3DModel.from_config(transformer.config)
        plain.load_state_dict(weights, assign=True)
        plain.save_pretrained(folder / "transformer")
    del weights
    for file, average in state.averages().items():
        whole = whole_tensors(average, kept=is_main)
        if is_main:
            save_file(whole, folder / file)
    if is_main:
        state.write_objectives(folder)
