"""How every operation here chooses among its implementations, and says what it chose.

An operation is a table of functions with one signature, `eager` first: the plain formula, which
the others are tested and timed against.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

Impl = Literal["auto", "eager", "chunked", "triton"]
F = TypeVar("F", bound=Callable[..., object])

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operation(Generic[F]):
    """One operation and its implementations.

    Args:
        name: as in messages.
        table: implementation by name.
        eager_tokens: up to so many tokens "auto" takes `eager`, whose few large calls then cost
            less than the tiles of `chunked`; beyond, `chunked`. It never takes `triton`: that
            waits until it is measured against `chunked` on a GPU (README.md).
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
        name = self._auto(student, tokens) if impl == "auto" else impl
        if name not in self.table:
            choices = ", ".join(["auto", *self.table])
            raise ValueError(f"{self.name} has no implementation {impl!r}; choose {choices}")
        if name == "triton":
            refuse_for_triton(self.name, student, teacher)
        return self.table[name]

    def _auto(self, student: Tensor, tokens: int) -> str:
        choice = "eager" if tokens <= self.eager_tokens else "chunked"
        if not torch.compiler.is_compiling():
            message = (
                f"{self.name}: {choice} on {student.device.type}, {student.dtype}, N={tokens}, "
                f"C={student.shape[-1]}"
            )
            if message not in self._logged:
                self._logged.add(message)
                _log.info(message)
        return choice


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
    for tensor in inputs:
        reason = triton_missing() or _unfit_for_triton(tensor)
        if reason is not None:
            raise ValueError(f"{operation}: impl='triton' cannot run: {reason}")


def _unfit_for_triton(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda" and not interpreted():
        return f"needs CUDA tensors, got {tensor.device.type}"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 and bfloat16, got {tensor.dtype}"
    if tensor.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes bfloat16 products wrongly"
    if tensor.shape[-1] == 0:
        return "needs at least one channel"
    return None
