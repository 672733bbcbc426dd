"""The small networks that map student tokens to the width of a teacher.

Initial weights are drawn from a generator that the caller seeds: building a projector neither
depends on global random state nor disturbs it.
"""

import math

import torch
from torch import Tensor, nn

REPA_HIDDEN = 2048


def refalign_projector(
    student_dim: int, teacher_dim: int, generator: torch.Generator
) -> nn.Sequential:
    """Builds Linear(d, d//2) SiLU Linear(d//2, out), both without bias (RefAlign's released code).

    Weights follow torch's default for a linear layer, as in that code.
    """
    return nn.Sequential(
        _torch_default(student_dim, student_dim // 2, generator),
        nn.SiLU(),
        _torch_default(student_dim // 2, teacher_dim, generator),
    )


def repa_projector(
    student_dim: int, teacher_dim: int, hidden: int, generator: torch.Generator
) -> nn.Sequential:
    """Builds REPA's three linear layers with SiLU between them (REPA's released code).

    Xavier-uniform weights and zero biases, as in that code.
    """
    return nn.Sequential(
        _xavier(student_dim, hidden, generator),
        nn.SiLU(),
        _xavier(hidden, hidden, generator),
        nn.SiLU(),
        _xavier(hidden, teacher_dim, generator),
    )


def project(projector: nn.Module, tokens: Tensor) -> Tensor:
    """Applies `projector` in the dtype of its own weights, whatever the dtype of the tokens."""
    projected: Tensor = projector(tokens.to(next(projector.parameters()).dtype))
    return projected


def _empty(in_dim: int, out_dim: int, *, bias: bool) -> nn.Linear:
    # Made on the meta device, because nn.Linear would draw its weights from global random state.
    return nn.Linear(in_dim, out_dim, bias=bias, device="meta").to_empty(device="cpu")


def _torch_default(in_dim: int, out_dim: int, generator: torch.Generator) -> nn.Linear:
    linear = _empty(in_dim, out_dim, bias=False)
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    return linear


def _xavier(in_dim: int, out_dim: int, generator: torch.Generator) -> nn.Linear:
    linear = _empty(in_dim, out_dim, bias=True)
    nn.init.xavier_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear
