"""Tensors in shards on the disk: all ranks write their parts, any number of ranks reads them.

By torch.distributed.checkpoint, as safetensors whose headers say which rows of which tensor they
hold; what all ranks have alike, rank 0 writes. torch's own format is not used: its reader unpickles
the metadata (`pickle.load` in `FileSystemReader.read_metadata`, torch 2.13), which runs any code
that somebody put there.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from alignlab.distributed.sharding import copy_whole
from alignlab.errors import UserError, first_line

SEPARATOR = "|"  # between the name of a parameter and that of its optimizer state


class ShardWriter(HuggingFaceStorageWriter):
    """Writes a rank's file from where its tensors are.

    torch's `write_data` makes the file in memory first, a second copy, and holds Python's lock
    meanwhile: training would stand still beside a thread that writes.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors, offsets, results = {}, {}, []
        for item in plan.items:
            name, part = item.index.fqn, planner.resolve_data(item)
            assert isinstance(part, Tensor) and item.tensor_data is not None
            assert name not in tensors, name  # along one dimension a rank has one part
            tensors[name] = part.detach().contiguous()
            offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(WriteResult(item.index, part.nbytes, None))
        if tensors:
            file = f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            about = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            save_file(tensors, Path(self.path) / file, metadata=about)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


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
    writer = ShardWriter(str(folder), save_distributed=True)
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


def read_into(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Reads what `write_shards` wrote into tensors: of those in shards, this rank's part.

    Args:
        tensors: by name, all of them; changed in place, whatever their dtype.
        folder: that was written to, by whatever number of ranks.

    Raises:
        RuntimeError: names or shapes are others.
    """
    reader = HuggingFaceStorageReader(str(folder))
    stored: dict[str, tuple[int, ...]] = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata)
        stored[name] = tuple(about.size)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if stored != shapes:
        odd = min(name for name in stored | shapes if stored.get(name) != shapes.get(name))
        raise RuntimeError(f"{folder}: {odd} is {stored.get(odd)}, not {shapes.get(odd)}")
    _load(dict(tensors), reader)


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
    _load(state, reader)
    return state


def _load(state: dict[str, Tensor], reader: HuggingFaceStorageReader) -> None:
    """Reads into tensors; each rank what it needs, and none waits for the others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, storage_reader=reader, no_dist=True)


@torch.no_grad()
def placed(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy of a state tensor, placed as its parameter is: on its device, and in shards."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        part = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
        copy_whole(part, value)
        return part
    return value.to(parameter.device, copy=True)
