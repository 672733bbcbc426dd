"""Gradient checkpointing of transformer blocks: all, every k-th, or all but matmuls and attention.

What a checkpointed block computes is dropped after the forward pass and computed again in the
backward pass, from the same inputs by the same code: gradients are those without it.
"""

from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

from diffusers import WanTransformer3DModel
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from alignlab.config.model import GradientCheckpointing, blocks_apart
from alignlab.errors import UserError

Contexts: TypeAlias = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

_MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"})
_ATTENTION = ("attention", "attn", "flash", "fmha")  # in names of torch's and packages' operations


def check_blocks_apart(mode: GradientCheckpointing, num_blocks: int) -> None:
    """Whether a transformer of so many blocks can be checkpointed so.

    Raises:
        UserError: `every:k` with more than it has.
    """
    apart = blocks_apart(mode)
    if apart is not None and apart > num_blocks:
        raise UserError(
            f"model.gradient_checkpointing: {mode}, but this transformer has {num_blocks} blocks; "
            f"set every:k with k from 2 to {num_blocks}, or false"
        )


def checkpoint_blocks(transformer: WanTransformer3DModel, mode: GradientCheckpointing) -> None:
    """Turns gradient checkpointing on, for every later forward pass with a gradient.

    Args:
        transformer: whose blocks are checkpointed.
        mode: `model.gradient_checkpointing`; blocks 0, k, 2k, ... of `every:k`.

    Raises:
        UserError: as `check_blocks_apart`.
    """
    check_blocks_apart(mode, len(transformer.blocks))
    apart = blocks_apart(mode)
    if apart is not None:
        chosen = frozenset(map(id, transformer.blocks[::apart]))
        transformer.enable_gradient_checkpointing(partial(_some, chosen))
    elif mode == "ops":
        transformer.enable_gradient_checkpointing(_all_but_kept)
    elif mode:
        transformer.enable_gradient_checkpointing()


def kept_contexts() -> Contexts:
    """For `context_fn` of torch's checkpoint: outputs of matmuls and attention are kept."""
    contexts: Contexts = create_selective_checkpoint_contexts(_policy)
    return contexts


def _some(chosen: frozenset[int], block: nn.Module, *args: Any) -> Any:
    if id(block) not in chosen:
        return block(*args)
    return checkpoint(block.__call__, *args, use_reentrant=False)


def _all_but_kept(block: nn.Module, *args: Any) -> Any:
    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=_reusable_contexts)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operation.__name__).split(".")[0]
    called = f"{getattr(operation, 'namespace', '')}.{name}"
    kept = name in _MATMULS or any(word in called for word in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _reusable_contexts() -> Contexts:
    forward, backward = kept_contexts()
    return forward, _Reused(backward)


class _Reused(AbstractContextManager[None]):
    """torch's context of the second computation, which forgets what was kept as it is read.

    A step may go backward through a block several times (`weight: gradient_share`, diagnosis): each
    reads a copy of the list. The tensors go when the graph does, block by block.
    """

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._kept = mode.storage

    def __enter__(self) -> None:
        self._mode.storage = {key: dict(entries) for key, entries in self._kept.items()}
        self._mode.__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._mode.__exit__(exc_type, exc, traceback)
        self._mode.storage = {}
