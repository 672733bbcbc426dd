"""The processes that train one run together, as torchrun or `accelerate launch` starts them.

Each holds all weights and takes an equal share of every step's samples; gradients are averaged once
per step, after all accumulation rounds. Nothing communicates inside a forward or backward pass, so
taps, gradient checkpointing and samples with different numbers of references need no special case.
The first process alone writes the run folder and evaluates.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor

from alignlab.distributed.launch_env import process_count, refuse_several
from alignlab.errors import UserError

Value = TypeVar("Value")

# The others wait this long for the first process to evaluate; NCCL would call minutes a hang.
PATIENCE = timedelta(days=1)
BUCKET = 2**25  # numbers averaged in one call: 128 MiB in fp32
KINDS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class Processes:
    """This process and those that train with it; without any, every method is free.

    All processes must call the same methods in the same order. Each of them raises a UserError
    where another process has stopped.

    Args:
        accelerator: of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count = accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self._device = accelerator.device
        self._patient = _patient_group() if self.count > 1 else None

    def share(self, rounds: int, batch_size: int) -> list[range]:
        """Positions in the step's batch that this process handles, one range per round.

        Raises:
            UserError: the batch does not divide into rounds and processes.
        """
        size, left = divmod(batch_size, rounds * self.count)
        if left or not size:
            raise UserError(
                f"optim.batch_size: {batch_size} is no multiple of optim.accumulate times "
                f"processes, {rounds} x {self.count}"
            )
        index = self.accelerator.process_index
        begins = [(i * self.count + index) * size for i in range(rounds)]
        return [range(begin, begin + size) for begin in begins]

    def on_main(self, work: Callable[[], Value]) -> Value:
        """What `work` gives in the first process, in all of them. They wait for it.

        Raises:
            UserError: of `work`, in all processes.
        """
        if self.count == 1:
            return work()
        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = work()
            except UserError as error:
                told[1] = error
        with _together():
            dist.broadcast_object_list(told, src=0, group=self._patient)
        if told[1] is not None:
            raise told[1]
        value: Value = told[0]
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            with _together():
                dist.barrier(group=self._patient)

    def average(self, gradients: list[Tensor | None], like: Sequence[Tensor]) -> None:
        """Averages gradients over the processes, in place.

        Args:
            gradients: of this process; None where its samples did not reach a parameter, which
                becomes a gradient if those of another process did.
            like: a tensor of the shape of each.
        """
        if self.count == 1:
            return
        reached = torch.tensor([float(g is not None) for g in gradients], device=self._device)
        _reduce(reached)
        places = [place for place, count in enumerate(reached.tolist()) if count]
        for place in places:
            if gradients[place] is None:
                gradients[place] = torch.zeros_like(like[place])
        for bucket in _buckets([g for p in places if (g := gradients[p]) is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            _reduce(flat)
            flat /= self.count
            for gradient, part in zip(
                bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean over the samples of all processes, in fp32; without keys that no sample has.

        Args:
            values: by key, one per sample of this process, (B,); B may be 0 and differ.

        Raises:
            UserError: another process has other keys.
        """
        if not values:
            return {}
        keys = sorted(values)
        sums = torch.stack([values[key].float().sum().to(self._device) for key in keys])
        counts = [len(values[key]) for key in keys]
        if self.count > 1:
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

    def check_same(self, what: str, value: object) -> None:
        """Refuses to go on if something that all processes must share differs among them.

        Raises:
            UserError: its `repr` differs.
        """
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(found, repr(value), group=self._patient)
        if len(set(found)) > 1:
            raise UserError(
                f"the processes differ in {what} ({', '.join(found)}): give all of them the same "
                "recipe, files, software and kind of device"
            )

    def _check_keys(self, keys: Sequence[str]) -> None:
        digest = float(zlib.crc32("\n".join(keys).encode()))
        ends = torch.tensor([digest, -digest], dtype=torch.float64, device=self._device)
        _reduce(ends, dist.ReduceOp.MAX)
        largest, smallest = ends.tolist()
        if largest != -smallest:
            raise UserError(
                "the processes log different terms: an objective must name the same parts "
                f"for every batch; here: {', '.join(keys)}"
            )


def join_processes(precision: str) -> Processes:
    """This process, its device and mixed precision, and the processes started with it.

    Raises:
        UserError: they cannot be joined, or accelerate is configured for what no run here uses.
    """
    # accelerate keeps the first precision of a process; runs of a comparison may differ in it.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=join_on_cpu(), mixed_precision="bf16" if precision == "bf16" else "no"
    )
    if accelerator.num_processes != process_count():
        raise UserError(
            f"WORLD_SIZE is {process_count()}, but accelerate joined {accelerator.num_processes}: "
            "start the processes with torchrun, which sets LOCAL_RANK too (docs/clusters.md)"
        )
    kind = accelerator.distributed_type
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    if kind not in KINDS or compiles:
        asked = "torch.compile" if compiles else kind.value
        raise UserError(
            f"accelerate is configured for {asked}, which nothing here does: use torchrun, or a "
            "configuration without it (docs/clusters.md)"
        )
    return Processes(accelerator)


def join_on_cpu() -> bool:
    """Whether accelerate must be told of the CPU, without which it joins none that have no GPU."""
    return process_count() > 1 and not torch.cuda.is_available()


def one_process(precision: str) -> Processes:
    """`join_processes` for what one process does alone.

    Raises:
        UserError: it was started as several.
    """
    refuse_several()
    return join_processes(precision)


def leave() -> None:
    """Parts from the other processes, if any; they cannot be joined again."""
    _patient_group.cache_clear()
    PartialState().destroy_process_group()


@cache
def _patient_group() -> dist.ProcessGroup:
    """A second group, on the CPU, for what takes long."""
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise UserError(
            f"the processes do not reach each other ({_first_line(error)}): name the network "
            "interface of each node in GLOO_SOCKET_IFNAME"
        ) from error
    assert isinstance(group, dist.ProcessGroup)  # every process is in it
    return group


@contextmanager
def _together() -> Iterator[None]:
    """Says in one line that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"another process has stopped, its own message says why ({_first_line(error)})"
        ) from error


def _reduce(values: Tensor, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    with _together():
        dist.all_reduce(values, how)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


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
