"""The ranks that train one run together, as torchrun or `accelerate launch` starts them.

Each rank holds all weights and takes an equal share of every step's samples; gradients are averaged
once per step, after all micro-batches. Nothing communicates inside a forward or backward pass, so
taps, gradient checkpointing and samples with different numbers of references need no special case.
Rank 0 alone writes the run folder and evaluates. What is otherwise where the transformer is in
shards (`model.shard`) is in `alignlab.distributed.sharding`.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from datetime import timedelta
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignlab.distributed import launch_env
from alignlab.environment import use_own_kernel_rows
from alignlab.errors import UserError, first_line

Value = TypeVar("Value")
Args = ParamSpec("Args")

# The others wait this long for rank 0 to evaluate; NCCL would call minutes a hang.
LONG_TIMEOUT = timedelta(days=1)
BUCKET = 2**25  # numbers averaged in one call: 128 MiB in fp32


class Ranks:
    """This rank and those that train with it; without any, every method is free.

    All ranks must call the same methods in the same order. Each of them raises a UserError where
    another rank has stopped.

    Args:
        device: of this rank.
        precision: `bf16` runs the transformer under autocast, `fp32` does not.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self.precision = precision
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._group = _long_timeout_group() if self.world_size > 1 else None

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks, of which there are several, on the CPU, for what takes long."""
        assert self._group is not None
        return self._group

    def apart(self) -> "Ranks":
        """The same ranks with a group of their own, for a thread beside the one that trains.

        All ranks call it at once.
        """
        other = copy(self)
        other._group = _new_group() if self.world_size > 1 else None
        return other

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder and evaluates."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision of the run."""
        return mixed_precision(self.device, self.precision)

    def micro_batches(self, accumulate: int, batch_size: int) -> list[range]:
        """Positions in the step's batch that this rank handles, one range per micro-batch.

        Raises:
            UserError: the batch does not divide into micro-batches and ranks.
        """
        size, left = divmod(batch_size, accumulate * self.world_size)
        if left or not size:
            raise UserError(
                f"optim.batch_size: {batch_size} is no multiple of optim.accumulate times "
                f"ranks, {accumulate} x {self.world_size}"
            )
        begins = [(i * self.world_size + self.rank) * size for i in range(accumulate)]
        return [range(begin, begin + size) for begin in begins]

    def on_main(
        self, work: Callable[Args, Value], *args: Args.args, **settings: Args.kwargs
    ) -> Value:
        """What `work` gives on rank 0, on all ranks. They wait for it.

        Raises:
            UserError: of `work`, on all ranks.
        """
        if self.world_size == 1:
            return work(*args, **settings)
        shared: list[Any] = [None, None]  # value, error
        if self.is_main:
            try:
                shared[0] = work(*args, **settings)
            except UserError as error:
                shared[1] = error
        with _all_alive():
            dist.broadcast_object_list(shared, src=0, group=self._group)
        if shared[1] is not None:
            raise shared[1]
        value: Value = shared[0]
        return value

    def barrier(self) -> None:
        """Waits until all ranks are here, for as long as an evaluation may take."""
        if self.world_size > 1:
            with _all_alive():
                dist.barrier(group=self._group)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes every rank step with the gradient of the whole batch.

        Those in shards are averaged already (`alignlab.distributed.sharding`).
        """
        parameters = [p for p in parameters if not isinstance(p, DTensor)]
        gradients = [parameter.grad for parameter in parameters]
        self.average(gradients, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def average(self, gradients: list[Tensor | None], like: Sequence[Tensor]) -> None:
        """Averages gradients over the ranks, in place.

        Args:
            gradients: of this rank; None where its samples did not reach a parameter, which
                becomes a gradient if those of another rank did.
            like: a tensor of the shape of each.
        """
        if self.world_size == 1:
            return
        reached = self.largest([g is not None for g in gradients])
        places = [place for place, is_reached in enumerate(reached) if is_reached]
        for place in places:
            if gradients[place] is None:
                gradients[place] = torch.zeros_like(like[place])
        for bucket in _buckets([g for p in places if (g := gradients[p]) is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            _reduce(flat)
            flat /= self.world_size
            for gradient, part in zip(
                bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean over the samples of all ranks, in fp32; without keys that no sample has.

        Args:
            values: by key, one per sample of this rank, (B,); B may be 0 and differ.

        Raises:
            UserError: another rank has other keys.
        """
        if not values:
            return {}
        keys = sorted(values)
        sums = torch.stack([values[key].float().sum().to(self.device) for key in keys])
        counts = [len(values[key]) for key in keys]
        if self.world_size > 1:
            self._check_keys(keys)
            total = torch.stack([sums, sums.new_tensor(counts)])
            _reduce(total)
            sums, counts = total[0], total[1].tolist()
        means = {
            key: sums[i] / count
            for i, (key, count) in enumerate(zip(keys, counts, strict=True))
            if count
        }
        return {key: means[key] for key in values if key in means}

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks of numbers on the device, for which the host does not wait."""
        if self.world_size > 1:
            values = values.clone()
            _reduce(values)
        return values

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest that any rank has of each of several small numbers, on all ranks.

        Hosts ask each other: none waits for its device.
        """
        if self.world_size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.int32)
        _reduce(shared, dist.ReduceOp.MAX, self._group)
        return [int(value) for value in shared.tolist()]

    def gathered(self, value: Value) -> list[Value]:
        """What every rank gives, in their order, on all ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _all_alive():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def check_same(self, what: str, value: object) -> None:
        """Stops if something that all ranks must share differs among them.

        Raises:
            UserError: its `repr` differs.
        """
        values = self.gathered(repr(value))
        if len(set(values)) > 1:
            raise UserError(
                f"the ranks differ in {what} ({', '.join(values)}): give all of them the same "
                "recipe, files, software and kind of device"
            )

    def _check_keys(self, keys: Sequence[str]) -> None:
        digest = float(zlib.crc32("\n".join(keys).encode()))
        ends = torch.tensor([digest, -digest], dtype=torch.float64, device=self.device)
        _reduce(ends, dist.ReduceOp.MAX)
        largest, smallest = ends.tolist()
        if largest != -smallest:
            raise UserError(
                "the ranks log different terms: an objective must name the same parts "
                f"for every batch; here: {', '.join(keys)}"
            )


def mixed_precision(
    device: torch.device, precision: str, *, cache: bool = True
) -> AbstractContextManager[Any]:
    """Under `bf16` the transformer runs in autocast, under `fp32` as it is.

    Args:
        device: that computes.
        precision: of the run.
        cache: keep bf16 copies of the weights until the end.
    """
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cache)


def join_ranks(precision: str) -> Ranks:
    """This rank, its device and mixed precision, in a process group with those started with it.

    Raises:
        UserError: they cannot form a process group, or accelerate is configured for what no run
            here uses.
    """
    launch_env.check_process_group()
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        use_own_kernel_rows()
    if launch_env.world_size() > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (dist.DistError, ValueError) as error:
            raise UserError(
                f"the ranks cannot form a process group ({first_line(error)}): see MASTER_ADDR and "
                "MASTER_PORT, and whether all of them were started"
            ) from error
    return Ranks(device, precision)


def single_rank(precision: str) -> Ranks:
    """`join_ranks` for what one process does alone.

    Raises:
        UserError: it was started as several.
    """
    launch_env.refuse_several_ranks()
    return join_ranks(precision)


def destroy_process_group() -> None:
    """Leaves the process group, if there is one; it cannot be joined again."""
    _long_timeout_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _device() -> torch.device:
    if launch_env.is_for_cpu():
        return torch.device("cpu")
    if torch.cuda.is_available() and launch_env.world_size() > 1:
        # a launcher may show each rank its own GPU only
        return torch.device("cuda", launch_env.local_rank() % torch.cuda.device_count())
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@cache
def _long_timeout_group() -> dist.ProcessGroup:
    """A second group, on the CPU, for what takes long."""
    return _new_group()


def _new_group() -> dist.ProcessGroup:
    try:
        group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
    except RuntimeError as error:
        raise UserError(
            f"the ranks do not reach each other ({first_line(error)}): name the network "
            "interface of each node in GLOO_SOCKET_IFNAME"
        ) from error
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group


@contextmanager
def _all_alive() -> Iterator[None]:
    """Says in one line that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(launch_env.lost_rank(error)) from error


def _reduce(
    values: Tensor,
    how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
) -> None:
    with _all_alive():
        dist.all_reduce(values, how, group)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, together at most `BUCKET` numbers unless one alone is larger."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        fits = size + tensor.numel() <= BUCKET
        if bucket and not (fits and tensor.dtype == bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
