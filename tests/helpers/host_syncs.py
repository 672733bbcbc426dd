"""What would make the host wait for a GPU, found on the CPU: meta tensors stand for those of a GPU.

A meta tensor has a device of its own and no values, so that nothing can read one unseen. What tries
to is noted here and answered with ones, and the step goes on.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import alignlab
from alignlab.teachers import Teacher
from alignlab.training.build_optimizer import build_optimizer
from alignlab.training.checkpoint import RunState
from alignlab.training.setup import Run

aten = torch.ops.aten
META = torch.device("meta")
ALIGNLAB = str(Path(alignlab.__file__).parent)
# Operations whose result, or its size, the host waits for.
READS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique,
    aten._unique2,
    aten.bincount,
}
INDEXED = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
MAKES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class HostSyncs(TorchDispatchMode):
    """Collects the names of such operations, and the lines of alignlab that they come from.

    Operations of alignlab's own, which torch sees as one each, are looked into.
    """

    is_paused: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> "HostSyncs":
        self._stack.enter_context(_NotesMadeTensors(self.note))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "alignlab":
            inner = OPDEFS[func.name()]._init_fn
            with _inside(self):
                return inner(*args, **kwargs)
        if self._waits(func.overloadpacket, args, kwargs):
            self.note(str(func))
            return _answered(func, args, kwargs)
        with _inside(self):  # an operation that is made of others, as torch sees it in an own one
            made_of_others = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if made_of_others is NotImplemented else made_of_others

    def note(self, name: str) -> None:
        """Collects a name, unless paused."""
        if not self.is_paused:
            frames = traceback.extract_stack()
            ours = [f for f in frames if f.filename.startswith(ALIGNLAB)]
            self.names.append(f"{name} at {ours[-1].filename}:{ours[-1].lineno}" if ours else name)

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """Nothing is collected meanwhile."""
        cls.is_paused = True
        try:
            yield
        finally:
            cls.is_paused = False

    @staticmethod
    def _waits(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in tensors) and packet is not aten._to_copy:
            return False
        if packet is aten._to_copy:
            to = kwargs.get("device") or args[0].device
            moves = args[0].is_meta != (torch.device(to) == META)
            return moves and (args[0].is_meta or not kwargs.get("non_blocking", False))
        if packet is aten.copy_:
            moves = args[0].is_meta != args[1].is_meta
            is_async = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return moves and (args[1].is_meta or not is_async)
        if packet in INDEXED and any(m is not None and m.dtype == torch.bool for m in args[1]):
            return True
        # a GPU takes no tensor of the CPU but single numbers
        return packet in READS or any(x.ndim and not x.is_meta for x in tensors)


class _NotesMadeTensors(TorchFunctionMode):
    """Notes values of the host that are made into tensors of the device, which is a copy."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in MAKES and out.is_meta:
            self._note(func.__name__)
        return out


@contextmanager
def _inside(mode: HostSyncs) -> Iterator[None]:
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)


def _answered(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operation gives for ones, as meta tensors again where it was not to read them."""

    def ones(x: Any) -> Any:
        return torch.ones_like(x, device="cpu") if isinstance(x, Tensor) and x.is_meta else x

    def back(x: Any) -> Any:
        return x.to(META) if isinstance(x, Tensor) else x

    out = func(*tree_map(ones, args), **tree_map(ones, kwargs))
    if isinstance(out, Tensor) and _ends_on_the_host(func, args):
        return out
    return tree_map(back, out)


def _ends_on_the_host(func: Any, args: Any) -> bool:
    if func.overloadpacket is aten._to_copy:
        return bool(args[0].is_meta)
    return func.overloadpacket is aten.copy_ and not args[0].is_meta


@contextmanager
def on_device(run: Run) -> Iterator[None]:
    """Moves a run to meta, as it would be on a GPU: a fused optimizer, a batch on the device.

    Encoders, with which clips are made into batches, stay.
    """
    run.wan.transformer.to(META)
    run.alignment.to(META)
    for teacher in run.alignment.teachers.values():
        assert isinstance(teacher, Teacher)
        teacher._model.to(META)
    with (
        patch.object(run.ranks, "device", META),
        patch("torch.autocast", lambda *_, **__: nullcontext()),  # knows no meta
        patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]),
    ):
        parameters = [*run.wan.transformer.parameters(), *run.alignment.parameters()]
        ema = None
        if run.config.optim.ema is not None:
            named = run.wan.transformer.named_parameters()
            ema = {name: p.detach().clone() for name, p in named if p.requires_grad}
        own = run.self_teacher
        if own is not None:
            own.average = {name: value.to(META) for name, value in own.average.items()}
        run.state = RunState(
            build_optimizer(parameters, run.config.optim),
            run.wan.transformer,
            run.alignment,
            ema,
            self_teacher=None if own is None else own.average,
        )
        yield
