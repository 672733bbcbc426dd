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
from alignlab.runs.checkpoint_folders import OPTIMIZER_SHARDS, prune, remove_replaced, step_path
from alignlab.runs.metric_rows import LogMark, mark_log
from alignlab.runs.run_folder import RunFolder
from alignlab.training import checkpoint
from alignlab.training.checkpoint import RunState, TrainState, save_lora, write_facts
from alignlab.training.optimizer_shards import write_shards


def save_checkpoint(
    state: TrainState, folder: RunFolder, ranks: Ranks, settings: CheckpointConfig
) -> Path:
    """`alignlab.training.checkpoint.save` for all ranks, which wait until it is written.

    Args:
        state: what is written.
        folder: of the run; where the state is in shards, all ranks see it.
        ranks: that train it.
        settings: which older checkpoints are kept.

    Raises:
        UserError: the ranks do not hold the same weights, or another one could not write.
    """
    if ranks.world_size > 1:
        norm = float(total_norm(list(state.names)))
        ranks.check_same("the norm of the trained weights", norm)
    log = mark_log(folder.metrics) if ranks.is_main else None
    if isinstance(state, RunState) and state.is_in_shards:
        _save_in_shards(state, folder.checkpoints, ranks, settings, log)
    elif ranks.is_main:
        keep, keep_every = settings.keep, settings.keep_every
        checkpoint.save(state, folder.checkpoints, keep=keep, keep_every=keep_every, log=log)
    ranks.barrier()  # here: the group that averages gradients has a shorter timeout
    return step_path(folder.checkpoints, state.step)


def _save_in_shards(
    state: RunState,
    checkpoints: Path,
    ranks: Ranks,
    settings: CheckpointConfig,
    log: LogMark | None,
) -> None:
    target = step_path(checkpoints, state.step)
    with ExitStack() as stack:
        folder = ranks.on_main(stack.enter_context, whole_folder(target))
        _write_weights(state, folder, ranks)
        write_shards(state.optimizer, state.names, folder / OPTIMIZER_SHARDS, ranks.group)
        if ranks.is_main:
            write_facts(state, folder, log)
    if ranks.is_main:
        remove_replaced(checkpoints, state.step)
        prune(checkpoints, settings.keep, settings.keep_every)


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
