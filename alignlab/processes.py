"""The processes that train one run together, as torchrun or `accelerate launch` starts them.

Each holds all weights and takes an equal share of every step's samples; gradients are averaged once
per step, after all accumulation rounds. Nothing communicates inside a forward or backward pass, so
taps, gradient checkpointing and samples with different numbers of references need no special case.
The first process alone writes the run folder and evaluates.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor

from alignlab.errors import UserError
from alignlab.launched import process_count, refuse_several

Value = TypeVar("Value")

# The others wait this long for the first process to evaluate; NCCL would call minutes a hang.
PATIENCE = timedelta(days=7)
BUCKET = 2**25  # numbers averaged in one call: 128 MiB in fp32


class Processes:
    """This process and those that train with it; without any, every method is free.

    All processes must call the same methods in the same order.

    Args:
        accelerator: of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.count = accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self._index = accelerator.process_index
        self._device = accelerator.device
        self._patient = None
        if self.count > 1:
            self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def share(self, rounds: int, batch_size: int) -> list[range]:
        """Positions in the step's batch that this process handles, one range per round.

        Raises:
            UserError: the batch does not divide into rounds and processes.
        """
        size, left = divmod(batch_size, rounds * self.count)
        if left or not size:
            raise UserError(
                f"optim.batch_size: {batch_size} samples per step do not divide into {rounds} "
                f"accumulation rounds on {self.count} processes"
            )
        begins = [(i * self.count + self._index) * size for i in range(rounds)]
        return [range(begin, begin + size) for begin in begins]

    def from_main(self, value: Value) -> Value:
        """What the first process passes; what the others pass is ignored. Waits for it."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._patient)
        return box[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
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
        dist.all_reduce(reached)
        places = [place for place, count in enumerate(reached.tolist()) if count]
        for place in places:
            if gradients[place] is None:
                gradients[place] = torch.zeros_like(like[place])
        for bucket in _buckets([g for p in places if (g := gradients[p]) is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.count
            for gradient, part in zip(
                bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean over the samples of all processes, in fp32; without keys that no sample has.

        Args:
            values: by key, one per sample of this process, (B,) on one device; B may be 0 and
                differ. All processes pass the same keys.
        """
        if not values:
            return {}
        sums = torch.stack([value.float().sum() for value in values.values()])
        counts = [len(value) for value in values.values()]
        if self.count > 1:
            total = torch.stack([sums, sums.new_tensor(counts)])
            dist.all_reduce(total)
            sums, counts = total[0], total[1].tolist()
        return {
            key: sums[i] / count
            for i, (key, count) in enumerate(zip(values, counts, strict=True))
            if count
        }

    def check_same(self, what: str, value: Tensor) -> None:
        """Refuses to go on if a number that all processes must share differs among them.

        Raises:
            UserError: it differs.
        """
        if self.count == 1:
            return
        found: list[float] = [0.0] * self.count
        dist.all_gather_object(found, float(value), group=self._patient)
        if len(set(map(repr, found))) > 1:
            raise UserError(
                f"the processes differ in {what} ({', '.join(f'{v:.9g}' for v in found)}): give "
                "all of them the same files, software and kind of device"
            )


def join_processes(precision: str) -> Accelerator:
    """The device of this process, its mixed precision, and the processes started with it."""
    # accelerate keeps the first precision of a process; runs of a comparison may differ in it.
    AcceleratorState._reset_state()
    # accelerate joins processes without GPUs only when it is told of the CPU
    cpu = process_count() > 1 and not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision="bf16" if precision == "bf16" else "no")


def one_process(precision: str) -> Accelerator:
    """`join_processes` for what one process does alone.

    Raises:
        UserError: it was started as several.
    """
    refuse_several()
    return join_processes(precision)


def part() -> None:
    """Takes leave of the other processes, if any; they cannot be joined again."""
    PartialState().destroy_process_group()


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
