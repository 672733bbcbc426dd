"""The optimizer's state of a transformer in shards: all ranks write it, any number reads it.

By torch.distributed.checkpoint, as safetensors whose headers say which rows of which tensor they
hold; what all ranks have alike, rank 0 writes.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from alignlab.distributed.sharding import copy_whole
from alignlab.errors import UserError, first_line

SEPARATOR = "|"  # between the name of a parameter and that of its optimizer state


def write_shards(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Writes this rank's part of every state tensor, and waits for the others.

    Args:
        state: by name; what is not in shards is alike on all ranks.
        folder: that all ranks see.
        group: the ranks.

    Raises:
        OSError: a file could not be written.
        UserError: by another rank.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # else in any of the files
    try:
        save(dict(state), storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as failure:
        own = failure.failures.get(dist.get_rank(group))
        if own is not None and isinstance(own[0], OSError):
            raise own[0] from failure
        rank, (error, _) = next(iter(failure.failures.items()))
        raise UserError(
            f"rank {rank} could not write its part of {folder} ({first_line(error)})"
        ) from failure


def read_shards(names: Mapping[nn.Parameter, str], folder: Path) -> dict[str, Tensor]:
    """What `write_shards` wrote: of parameters in shards this rank's part, of others all.

    Args:
        names: of the parameters.
        folder: that it was written to, by whatever number of ranks.

    Raises:
        KeyError: a tensor belongs to no parameter.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    state: dict[str, Tensor] = {}
    reader = HuggingFaceStorageReader(str(folder))
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        parameter, dtype = by_name[key.rsplit(SEPARATOR, 1)[0]], stored.properties.dtype
        if stored.size == parameter.shape:
            state[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            state[key] = torch.zeros(stored.size, dtype=dtype, device=parameter.device)
    load(state, storage_reader=reader, no_dist=True)  # each rank reads what it needs
    return state


@torch.no_grad()
def placed(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy of a state tensor, placed as its parameter is: on its device, and in shards."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        part = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
        copy_whole(part, value)
        return part
    return value.to(parameter.device, copy=True)
