"""How every operation here chooses among its implementations, and says what it chose.

An operation is a table of functions with one signature, `eager` first: the plain formula, which
the others are tested and timed against.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from operator import index
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from alignlab.kernels import speed_table

Impl = Literal["auto", "eager", "chunked", "triton"]
F = TypeVar("F", bound=Callable[..., object])

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operation(Generic[F]):
    """One operation and its implementations.

    "auto" on a GPU goes by what was measured on that device (`speed_table.py`), and takes `chunked`
    where nothing was. Elsewhere it goes by the number of tokens alone, so that a run on a CPU has
    the same bits on every machine.

    Args:
        name: as in messages.
        table: implementation by name.
        eager_tokens: up to so many tokens "auto" takes `eager` on a CPU, whose few large calls then
            cost less than the tiles of `chunked`; beyond, `chunked`.
    """

    name: str
    table: Mapping[str, F]
    eager_tokens: int
    _logged: set[str] = field(default_factory=set, compare=False)

    def implementations(self) -> dict[str, str | None]:
        """Lists every implementation, with the reason it cannot run here or None if it can."""
        return {name: triton_missing() if name == "triton" else None for name in self.table}

    def choose(self, impl: str, student: Tensor, teacher: Tensor, tokens: int) -> F:
        """Gives the implementation that `impl` asks for.

        Args:
            impl: "auto" or a name of the table.
            student: as the operation gets it, (..., C).
            teacher: likewise.
            tokens: how many tokens of a sample are compared with each other.

        Raises:
            ValueError: there is no such implementation, or it cannot run here.
        """
        name = self._auto(student, teacher, tokens) if impl == "auto" else impl
        if name not in self.table:
            choices = ", ".join(["auto", *self.table])
            raise ValueError(f"{self.name} has no implementation {impl!r}; choose {choices}")
        if name == "triton":
            refuse_for_triton(self.name, student, teacher)
        return self.table[name]

    def _auto(self, student: Tensor, teacher: Tensor, tokens: int) -> str:
        device, width, why = gpu_name(student.device), student.shape[-1], ""
        if device is None:
            choice = "eager" if tokens <= self.eager_tokens else "chunked"
        else:
            matrices = student.numel() // max(tokens * width, 1)
            # torch.compile needs numbers, where its shapes may be symbols
            sizes = (index(tokens), index(width), index(matrices))
            choice, why = _measured(self.name, device, student.dtype, *sizes)
            if choice == "triton" and (reason := _unfit_for_triton(student, teacher)):
                choice, why = "chunked", f" (triton, the fastest here, cannot run: {reason})"
        if not torch.compiler.is_compiling():
            message = (
                f"{self.name}: {choice} on {student.device.type}, {student.dtype}, N={tokens}, "
                f"C={width}{why}"
            )
            if message not in self._logged:
                self._logged.add(message)
                _log.info(message)
        return choice


def _constant(function: F) -> F:
    """What torch.compile calls while it traces, and whose result is then a constant.

    As `torch.compiler.assume_constant_result`, which would import all of torch's compiler here.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def gpu_name(device: torch.device) -> str | None:
    """The name by which measured rows know a device; None: it is no CUDA (or ROCm) device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@_constant
def _measured(
    operation: str, device: str, dtype: torch.dtype, tokens: int, width: int, matrices: int
) -> tuple[str, str]:
    """The implementation that was the fastest, and which size says so."""
    table = speed_table.table_of(device)
    if table.decisions:
        if table.problem is not None:
            _tell_once(f"{table.problem}; the rows that came with alignlab are used")
    else:
        why = table.problem or f"no kernel was measured on {device}"
        _tell_once(
            f"{why}: impl=auto takes chunked; `alignlab bench kernels --device cuda --install` "
            "measures this GPU, and auto then takes what was fastest"
        )
        return "chunked", ""
    size = speed_table.Size(operation, str(dtype).removeprefix("torch."), tokens, width, matrices)
    nearest = table.nearest(size) if min(tokens, width, matrices) > 0 else None
    if nearest is None:
        return "chunked", f" (nothing near it was measured on {device})"
    at = f"N={nearest.tokens}, C={nearest.width}, {nearest.matrices} at once"
    return table.decisions[nearest], f" (measured with {at})"


@cache
def _tell_once(text: str) -> None:
    _log.warning(text)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing() -> str | None:
    """Why Triton kernels cannot run on this machine, or None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed (it exists for Linux only)"
    if torch.cuda.is_available() or interpreted():
        return None
    return "needs a CUDA device"


def refuse_for_triton(operation: str, *inputs: Tensor) -> None:
    """Refuses what no Triton kernel here can compute, for every operation and in one place.

    Args:
        operation: as in messages.
        inputs: the vectors that are compared, (..., C).

    Raises:
        ValueError: this machine or the tensors' device cannot run Triton, a dtype is not one of the
            kernels', or there are no channels.
    """
    reason = _unfit_for_triton(*inputs)
    if reason is not None:
        raise ValueError(f"{operation}: impl='triton' cannot run: {reason}")


def _unfit_for_triton(*inputs: Tensor) -> str | None:
    """Why no Triton kernel can compute with all of these, or None."""
    reasons = (triton_missing() or _unfit(tensor) for tensor in inputs)
    return next((reason for reason in reasons if reason is not None), None)


def _unfit(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda" and not interpreted():
        return f"needs CUDA tensors, got {tensor.device.type}"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 and bfloat16, got {tensor.dtype}"
    if tensor.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes bfloat16 products wrongly"
    if tensor.shape[-1] == 0:
        return "needs at least one channel"
    return None
