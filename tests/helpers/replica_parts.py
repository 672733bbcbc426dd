"""What each of four processes does with a small network in two replicas of two shards."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from alignlab.distributed.ranks import join_ranks
from alignlab.distributed.sharding import (
    copy_whole,
    local_part,
    scale_gradients,
    shard_transformer,
    total_norm,
    whole_tensors,
)
from alignlab.training.sharded_files import read_into, write_shards


class Network(nn.Module):
    """Of blocks as a transformer has them; rows do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 3)])


def check_parts(folder: Path) -> None:
    """Raises AssertionError where this rank's parts are not those of the whole network.

    Args:
        folder: gets what the ranks write.
    """
    ranks = join_ranks("fp32")
    torch.manual_seed(0)
    network: Any = Network()
    whole = {name: value.detach().clone() for name, value in network.named_parameters()}
    shard_transformer(network, ranks, replicas=2)
    named: dict[str, nn.Parameter] = dict(network.named_parameters())
    half = ranks.rank % 2  # ranks that follow each other share a replica
    for name, value in whole.items():
        assert torch.equal(local_part(named[name]), value.chunk(2)[half]), name

    expected = {name: 2 * value for name, value in whole.items()}
    for name, parameter in named.items():
        parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        copy_whole(parameter.grad, expected[name])
    norm = total_norm(gradients(named))
    torch.testing.assert_close(norm, get_total_norm(list(expected.values())))
    scale_gradients(list(named.values()), 0.5, norm)
    scaled = whole_tensors(dict(zip(named, gradients(named), strict=True)), kept=True)
    for name, value in expected.items():
        torch.testing.assert_close(scaled[name], value * 0.5 / norm, msg=name)

    write_shards({name: value.detach() for name, value in named.items()}, folder, ranks.group)
    again = {name: torch.zeros_like(value.detach()) for name, value in named.items()}
    read_into(again, folder)
    for name, value in again.items():
        assert torch.equal(local_part(value), local_part(named[name])), name


def gradients(named: dict[str, nn.Parameter]) -> list[Tensor]:
    """Of parameters that all have one."""
    return [value.grad for value in named.values() if value.grad is not None]
