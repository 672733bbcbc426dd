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
    _told: set[str] = field(default_factory=set, compare=False)

    def implementations(self) -> dict[str, str | None]:
        """Lists every implementation, with the reason it cannot run here or None if it can."""
        return {name: triton_missing() if name == "triton" else None for name in self.table}

    def choose(self, impl: str, tokens: Tensor) -> F:
        """Gives the implementation that `impl` asks for, for `tokens` (..., N, C).

        Raises:
            ValueError: there is no such implementation, or it cannot run here.
        """
        name = self._auto(tokens) if impl == "auto" else impl
        if name not in self.table:
            known = ", ".join(["auto", *self.table])
            raise ValueError(f"{self.name} has no implementation {impl!r}; choose {known}")
        if name == "triton":
            _refuse_triton(self.name, tokens)
        return self.table[name]

    def _auto(self, tokens: Tensor) -> str:
        count, width = tokens.shape[-2:]
        choice = "eager" if count <= self.eager_tokens else "chunked"
        if not torch.compiler.is_compiling():
            message = (
                f"{self.name}: {choice} on {tokens.device.type}, {tokens.dtype}, N={count}, "
                f"C={width}"
            )
            if message not in self._told:
                self._told.add(message)
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


def _refuse_triton(operation: str, tokens: Tensor) -> None:
    reason = triton_missing()
    if reason is None and tokens.device.type != "cuda" and not interpreted():
        reason = f"needs CUDA tensors, got {tokens.device.type}"
    if reason is None and tokens.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reason = f"takes float32, float16 and bfloat16, got {tokens.dtype}"
    if reason is None and tokens.dtype == torch.bfloat16 and interpreted():
        reason = "Triton's interpreter computes bfloat16 products wrongly"
    if reason is not None:
        raise ValueError(f"{operation}: impl='triton' cannot run: {reason}")
