"""torch.compile of a transformer's blocks: one compiled code for all of them, taps outside of it.

diffusers' `compile_repeated_blocks` compiles the call of a block, with its hooks: a tap's hook is
then traced, and each tapped block is compiled anew. Here the block's forward is compiled and its
hooks run around that, as torch runs them: tapped blocks share the code of the others.

Shape letters: B batch, N tokens, L text tokens, D width.
"""

import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignlab.errors import UserError, one_line
from alignlab.models.gradient_checkpointing import kept_contexts
from alignlab.progress import tell_once

BACKEND = "inductor"
LIMIT = 64
"""Variants of the compiled code: with and without a gradient, one sample and several, weights of
the model and of a moving average; 2 to 16 as a rule. More raise an error."""

Forward = Callable[..., Tensor]


def check_compiler(device: torch.device | str) -> None:
    """Whether blocks can be compiled for a device.

    Raises:
        UserError: torch.compile makes no code for it, or what it needs there is missing.
    """
    kind = torch.device(device).type
    fix = "or set model.compile=none"
    if kind not in ("cpu", "cuda"):
        raise UserError(f"model.compile: blocks are compiled for cuda and cpu, not {kind}; {fix}")
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(f"model.compile: needs triton on a GPU: pip install it, {fix}")
    named = os.environ.get("CC" if kind == "cuda" else "CXX")
    needed = [named] if named else ["gcc", "clang"] if kind == "cuda" else ["g++", "clang++"]
    if not any(map(shutil.which, needed)):
        raise UserError(
            f"model.compile: needs a compiler ({' or '.join(needed)}): install it, {fix}"
        )


def compile_blocks(transformer: WanTransformer3DModel, *, keep_ops: bool = False) -> None:
    """Compiles every block when it is first called; parameters keep their names.

    Numbers of samples and of tokens are dynamic, so that numbers of references share the code.
    Gradient checkpointing of blocks and hooks on them stay outside; hooks on modules inside a block
    are not seen.

    Args:
        transformer: with its adapters and gradient checkpointing.
        keep_ops: gradient checkpointing that keeps the outputs of matmuls and attention, compiled
            with the block (`gradient_checkpointing: ops`).
    """
    # of one code; torch 2.11 takes no limit with `compile`
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    # a step may go backward twice through one graph, which inductor must not write into
    torch._functorch.config.donated_buffer = False
    # else each number of video tokens, which cross-attention is told, would be a variant
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # torch looks at the gradient of every tensor that it traces
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    forward = _own_code(type(transformer.blocks[0]).forward)
    function = _keeping_ops(forward) if keep_ops else forward
    # `fullgraph`: no break falls back to eager, and neither does a variant too many
    run = torch.compile(function, fullgraph=True, backend=BACKEND)
    for block in transformer.blocks:
        block.forward = _Compiled(run, block)


def _own_code(forward: Forward) -> Forward:
    """The same function with code of its own, under which torch keeps what it compiled: of this
    model alone, and gone with it."""
    assert isinstance(forward, types.FunctionType)
    code = forward.__code__.replace()
    return types.FunctionType(
        code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )


def _keeping_ops(forward: Forward) -> Forward:
    def run(block: nn.Module, *args: Any) -> Any:
        return checkpoint(forward, block, *args, use_reentrant=False, context_fn=kept_contexts)

    return _own_code(run)


@dataclass
class _Compiled:
    """What stands for `block.forward`: a copy of the block runs the copy's weights."""

    run: Forward
    block: nn.Module

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        tell_once(
            "model.compile: the transformer's blocks are compiled in the first steps and the first "
            "evaluation, which takes minutes"
        )
        _mark(hidden_states, 0, 1)
        _mark(encoder_hidden_states, 0)
        _mark(temb, *((0, 1) if temb.ndim == 4 else (0,)))
        for table in rotary_emb:
            _mark(table, 1)
        try:
            return self.run(self.block, hidden_states, encoder_hidden_states, temb, rotary_emb)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"model.compile: a block cannot be compiled ({one_line(error)}); set "
                "model.compile=none"
            ) from error


def _mark(tensor: Tensor, *dimensions: int) -> None:
    for dimension in dimensions:
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
