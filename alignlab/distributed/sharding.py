"""The transformer in shards: each rank holds a part of every weight (FSDP2, `model.shard`).

torch's `fully_shard` makes a DTensor of each parameter, whose local tensor is this rank's rows.
A block's weights are whole while it computes, forward or backward, and on all ranks at once: all of
them must make equally many forward calls. Gradients, optimizer state and moving average are shards
as the weights are. Projectors are not sharded: their gradients are averaged
(`Ranks.average_gradients`), and so every function here takes both kinds.

With `model.replicate` (HSDP) there are several replicas of each shard: ranks that follow each other
share a replica, and what a collective counts or gathers is that of one.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from alignlab.config.model import ModelConfig
from alignlab.distributed.ranks import Ranks
from alignlab.errors import UserError
from alignlab.progress import warn_once


def is_in_shards(config: ModelConfig, ranks: Ranks) -> bool:
    """Whether a run shards its transformer: the recipe says so, and it has several ranks."""
    return config.shard == "fsdp2" and ranks.world_size > 1


def num_shards(config: ModelConfig, world_size: int) -> int:
    """Into how many parts the ranks divide the transformer; 1: each holds all of it.

    Args:
        config: of the model.
        world_size: how many ranks there are.

    Raises:
        UserError: they do not divide into `model.replicate` replicas of several ranks each.
    """
    if config.shard == "none" or world_size == 1:
        return 1
    shards, left = divmod(world_size, config.replicate)
    if left or not shards:
        raise UserError(
            f"model.replicate: {world_size} ranks are no multiple of {config.replicate} replicas: "
            "set it to the number of nodes, or to 1"
        )
    if shards == 1:
        raise UserError(
            f"model.replicate: {config.replicate} replicas on as many ranks leave nothing to "
            "shard: set model.shard=none model.replicate=1, or a smaller model.replicate"
        )
    return shards


def check_shards(config: ModelConfig, ranks: Ranks) -> None:
    """Says that a single process shards nothing.

    Raises:
        UserError: the ranks are on devices that have no collectives, or as `num_shards`.
    """
    if config.shard == "none":
        return
    num_shards(config, ranks.world_size)
    if ranks.device.type not in ("cuda", "cpu"):
        raise UserError(
            f"model.shard: {config.shard} needs CUDA devices or CPUs, this one is "
            f"{ranks.device.type}: set model.shard=none"
        )
    if ranks.world_size == 1:
        warn_once(
            f"model.shard: {config.shard}: this process is the only one, and holds the whole "
            "transformer; several are started by torchrun (docs/gpus.md)"
        )


def shard_transformer(
    transformer: WanTransformer3DModel, ranks: Ranks, *, replicas: int = 1
) -> None:
    """Leaves this rank's shards of a transformer, on its device, in place of the whole weights.

    The weights stay in their dtype, and so does all that the transformer is given: the run's
    autocast computes in bf16. `MixedPrecisionPolicy` on the root would round timesteps to bf16.

    Args:
        transformer: with its adapter, the same on all ranks; before there is an optimizer.
        ranks: that share it.
        replicas: `model.replicate`, of which the number of ranks is a multiple.

    Raises:
        UserError: the ranks have read other weights.
    """
    # later, each knows its part alone
    ranks.check_same("the weights of the transformer", float(weight_norm(transformer)))
    mesh = _mesh(ranks, replicas)
    # the root too: what stays whole after an evaluation would be stale in the next step
    for module in (*transformer.blocks, transformer):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _mesh(ranks: Ranks, replicas: int) -> DeviceMesh:
    """All ranks as shards, or as a row of shards for each replica."""
    kind, count = ranks.device.type, ranks.world_size
    if replicas == 1:
        return init_device_mesh(kind, (count,))
    names = ("replicate", "shard")
    return init_device_mesh(kind, (replicas, count // replicas), mesh_dim_names=names)


def reduce_gradients(transformer: nn.Module, *, is_last: bool) -> None:
    """Whether the next backward pass averages gradients over the ranks and leaves shards of them.

    Before the last micro-batch of a step it does not: each rank then keeps its own whole gradient.
    """
    if isinstance(transformer, FSDPModule):
        transformer.set_requires_gradient_sync(is_last)


def has_shards(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is in shards."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def alike(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in shards and others apart, as foreach and fused kernels take them."""
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return list(kinds.values())


@torch.no_grad()
def weight_norm(network: nn.Module) -> Tensor:
    """Norm of all parameters, of which none is in shards, in fp32."""
    norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p in network.parameters()]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def total_norm(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of tensors as one vector; of shards, that of the whole tensors, on all ranks."""
    sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if not sharded:
        return get_total_norm(tensors, norm_type)
    mesh, device = sharded[0].device_mesh, local_part(sharded[0]).device
    group = mesh.get_group(mesh.ndim - 1)  # of one replica: the others hold the same shards
    parts = [part for tensor in sharded if (part := local_part(tensor).detach()).numel()]
    own = get_total_norm(parts, norm_type).to(device)
    norms = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(norms, own, group)  # all: a maximum would lose what is not finite
    plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if plain:
        norms.append(get_total_norm(plain, norm_type).to(device))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm


def scale_gradients(parameters: Sequence[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scales gradients of a norm down to one of at most `largest`, in place."""
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    clip_grads_with_norm_(plain, largest, norm)
    grads = [p.grad for p in parameters if isinstance(p, DTensor) and p.grad is not None]
    if grads:
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)  # as `clip_grads_with_norm_`
        torch._foreach_mul_([local_part(gradient) for gradient in grads], scale)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        part: Tensor = tensor.to_local()
        return part
    return tensor


def whole_tensors(tensors: Mapping[str, Tensor], *, kept: bool) -> dict[str, Tensor]:
    """Tensors whole, on the CPU; those that are not in shards as they are.

    Args:
        tensors: the same names in the same order on all ranks.
        kept: by this rank. What another one keeps is gathered all the same, one at a time.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            gathered = tensor.full_tensor().detach()
            if kept:
                whole[name] = gathered.cpu()
        elif kept:
            whole[name] = tensor
    return whole


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one of the same shape, of which this rank may hold a part.

    Raises:
        RuntimeError: the shapes differ.
    """
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        if value.shape != target.shape:
            raise RuntimeError(f"shapes differ: {tuple(value.shape)} and {tuple(target.shape)}")
        value = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    local_part(target).copy_(local_part(value))
