"""Tensors without values: shapes, dtypes and lifetimes are as in a run, nothing is computed.

What a run keeps on the host to decide by (numbers of clips, subject ids, single draws) keeps its
values here as well: integers, bools and single numbers, and what is made of nothing else.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_HOST_DTYPES = (torch.int64, torch.int32, torch.bool)
_SERIES = (torch.ops.aten.arange, torch.ops.aten.linspace)  # such as a table of noise levels


on_host = _disable_current_modes
"""Within `fake_values`, what is computed inside has values."""


@contextmanager
def fake_values() -> Iterator[None]:
    """What is made inside of floating-point numbers has no values and takes no memory."""
    with _modules_convert(), FakeTensorMode(allow_non_fake_inputs=True), _HostValues():  # type: ignore[no-untyped-call]
        yield


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors of what an operation is given or gives, in lists as well."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class _HostValues(TorchDispatchMode):
    """Computes what is of the host's."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        if tensors:
            is_host = not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors)
        else:
            is_host = _makes_host_values(func, args, kwargs)
        if not is_host:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _makes_host_values(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation that is given no tensor makes what the host decides by."""
    if kwargs.get("device") == torch.device("meta"):
        return False
    if func.overloadpacket in _SERIES:
        return True
    dtype = kwargs.get("dtype")
    if dtype is not None and dtype in _HOST_DTYPES:
        return True
    size = next((arg for arg in args if isinstance(arg, list | tuple | torch.Size)), None)
    if size is not None and math.prod(size) == 1 and not isinstance(args[0], Tensor):
        return True
    numbers = [arg for arg in args if isinstance(arg, bool | int | float)]
    is_whole = bool(numbers) and all(isinstance(number, int) for number in numbers)
    return dtype is None and is_whole


@contextmanager
def _modules_convert() -> Iterator[None]:
    """Modules of fake tensors can be cast and moved: torch would swap tensors, which fake ones,
    that others refer to weakly, refuse."""
    own = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]


def _apply(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed = change(parameter)
        if isinstance(parameter, FakeTensor) and parameter.device == changed.device:
            parameter.data = changed
        else:
            module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module
