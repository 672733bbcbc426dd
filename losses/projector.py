"""The small networks that map student tokens to the width of a teacher, and initial weights.

Initial weights, also those of the Stage 1 networks, come from a generator or a seed that the caller
gives: building a network neither depends on global random state nor disturbs it.
Shape letters: B batch, T frames, N tokens of all frames, D width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

REPA_HIDDEN = 2048

InitialWeights = Literal["torch", "xavier"]
"""Of linear layers: torch's default weights and biases, or Xavier-uniform with zero biases."""


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
    student_dim: int,
    teacher_dim: int,
    hidden: int,
    generator: torch.Generator,
    *,
    initial: InitialWeights = "xavier",
) -> nn.Sequential:
    """Builds REPA's three linear layers with SiLU between them (REPA's released code).

    Xavier-uniform weights and zero biases, as in that code. VideoREPA's code has the same layers
    with torch's default weights and biases.
    """
    return _mlp((student_dim, hidden, hidden, teacher_dim), generator, initial)


def deep_projector(
    student_dim: int, width: int, hidden: int, generator: torch.Generator
) -> nn.Sequential:
    """Builds four linear layers with SiLU between them; weights drawn as for `repa_projector`."""
    return _mlp((student_dim, hidden, hidden, hidden, width), generator)


def irepa_projector(student_dim: int, teacher_dim: int, generator: torch.Generator) -> nn.Conv2d:
    """Builds one 3x3 convolution with padding 1 over a frame's tokens (iREPA's released code).

    Weights and bias follow torch's default for a convolution. Use `project_frames`.
    """
    conv = nn.Conv2d(student_dim, teacher_dim, 3, padding=1, device="meta").to_empty(device="cpu")
    _draw_torch_default(conv, generator)
    return conv


def pooling_convolution(width: int, pool: int, generator: torch.Generator) -> nn.Conv2d:
    """Builds a convolution that makes one token of `pool` x `pool` (VideoREPA's released code).

    Weights and bias follow torch's default for a convolution. Use `project_frames`.
    """
    conv = nn.Conv2d(width, width, pool, stride=pool, device="meta").to_empty(device="cpu")
    _draw_torch_default(conv, generator)
    return conv


def linear_projector(
    student_dim: int, teacher_dim: int, generator: torch.Generator
) -> nn.Sequential:
    """Builds LayerNorm, Linear with bias, as SimpleTuner's unofficial CREPA does.

    Torch's default weights; the norm starts as the identity on normalised tokens.
    """
    norm = nn.LayerNorm(student_dim)  # ones and zeros: nothing is drawn
    return nn.Sequential(norm, _torch_default(student_dim, teacher_dim, generator, bias=True))


def project(projector: nn.Module, tokens: Tensor) -> Tensor:
    """Applies `projector` in the dtype of its own weights, whatever the dtype of the tokens."""
    projected: Tensor = projector(tokens.to(next(projector.parameters()).dtype))
    return projected


def project_frames(projector: nn.Module, tokens_BND: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Applies a convolution to each frame's token grid, as `project` does to each token.

    Args:
        projector: takes and gives (frames, D, H, W), of any sizes.
        tokens_BND: N = T*H*W of `grid`.
        grid: (T, H, W).
    """
    batch, _, width = tokens_BND.shape
    frames = tokens_BND.reshape(batch * grid[0], grid[1], grid[2], width).permute(0, 3, 1, 2)
    projected = project(projector, frames)
    return projected.flatten(2).mT.reshape(batch, -1, projected.shape[1])


def draw_initial_weights(module: nn.Module, seed: int) -> None:
    """Fills a Stage 1 network that was built on the meta device, in place, on the CPU.

    Matrices and convolution kernels: Xavier-uniform. Biases: zero. Gains of norms: one.

    Args:
        module: its parameters have names that end in `weight` or `bias`, and it has no buffers.
        seed: of the weights; global random state is neither read nor changed.
    """
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        _draw_initial(name, parameter, generator)


@torch.no_grad()
def _draw_initial(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.ndim > 1:
        nn.init.xavier_uniform_(parameter, generator=generator)
    elif name.endswith("bias"):
        nn.init.zeros_(parameter)
    else:
        nn.init.ones_(parameter)


def _empty(in_dim: int, out_dim: int, *, bias: bool) -> nn.Linear:
    # Made on the meta device, because nn.Linear would draw its weights from global random state.
    return nn.Linear(in_dim, out_dim, bias=bias, device="meta").to_empty(device="cpu")


def _torch_default(
    in_dim: int, out_dim: int, generator: torch.Generator, *, bias: bool = False
) -> nn.Linear:
    linear = _empty(in_dim, out_dim, bias=bias)
    _draw_torch_default(linear, generator)
    return linear


def _draw_torch_default(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1.0 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _mlp(
    widths: Sequence[int], generator: torch.Generator, initial: InitialWeights = "xavier"
) -> nn.Sequential:
    """Linear layers of these widths with SiLU between them."""
    draw = _draw_torch_default if initial == "torch" else _draw_xavier
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        linear = _empty(into, out, bias=True)
        draw(linear, generator)
        layers += [linear, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _draw_xavier(layer: nn.Linear, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
